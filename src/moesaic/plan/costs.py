"""Energy and money of a plan, as ranges: prices and losses of buildings differ by more than any model could tell."""

from dataclasses import dataclass

from moesaic.plan.cluster import DOLLARS_PER_KWH, POWER_OVERHEAD, Cluster

UTILISED = (0.6, 1.0)
"""Share of the design power that busy devices draw."""


@dataclass(frozen=True)
class Costs:
    """Low and high."""

    kilowatt_hours: tuple[float, float]
    dollars: tuple[float, float] | None
    """Renting the devices; None where nobody rents them out."""
    electricity_dollars: tuple[float, float]


def costs(cluster: Cluster, seconds: float, spread: float) -> Costs:
    """Of the whole cluster for so many seconds, which may be less or more by the share `spread`."""
    hours = (seconds / 3600 / (1 + spread), seconds / 3600 * (1 + spread))
    kilowatts = cluster.device.watts * cluster.count / 1000
    energy = (
        hours[0] * kilowatts * UTILISED[0] * POWER_OVERHEAD[0],
        hours[1] * kilowatts * UTILISED[1] * POWER_OVERHEAD[1],
    )
    price = cluster.device.dollars_per_hour
    rent = (hours[0] * cluster.count * price[0], hours[1] * cluster.count * price[1]) if price[1] else None
    return Costs(energy, rent, (energy[0] * DOLLARS_PER_KWH[0], energy[1] * DOLLARS_PER_KWH[1]))


def dollars_per_million(cluster: Cluster, tokens_per_second: float, spread: float) -> tuple[float, float]:
    """Of tokens: rent where there is one, else electricity."""
    one = costs(cluster, 1e6 / tokens_per_second, spread)
    return one.dollars or one.electricity_dollars
