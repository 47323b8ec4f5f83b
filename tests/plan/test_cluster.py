"""Names of clusters, and files of one's own."""

from pathlib import Path

import pytest

from moesaic.errors import UsageError
from moesaic.plan.cluster import find_device, parse_cluster
from moesaic.plan.hardware import DEVICES


@pytest.mark.parametrize(
    ("text", "device", "count"),
    [("8xH100", "H100", 8), ("256 x h800", "H800", 256), ("laptop", "laptop", 1), ("2xrtx4090", "RTX-4090", 2)],
)
def test_devices_are_found_however_they_are_spelt(text: str, device: str, count: int) -> None:
    cluster = parse_cluster(text)
    assert (cluster.device.name, cluster.count) == (device, count)


def test_options_change_what_they_name_and_nothing_else() -> None:
    plain = parse_cluster("256xH800")
    wired = parse_cluster("256xH800:ib200:nvlink450:node4:host512GiB:nvme5")
    assert wired.device.network == 200e9 / 8
    assert wired.device.link == 450e9
    assert (wired.node_size, plain.node_size) == (4, 8)
    assert wired.host_memory == 512 * 2**30
    assert wired.disk == 12e9
    assert wired.device.memory == plain.device.memory
    laptop = parse_cluster("laptop:32GiB:ddr5")
    assert (laptop.device.memory, laptop.device.bandwidth) == (32 * 2**30, 83.2e9)
    # The memory of a graphics card is not changed by that of its host.
    hosted = parse_cluster("1xRTX-4090:ddr5x8")
    assert (hosted.device.bandwidth, hosted.host_bandwidth) == (1008e9, 307e9)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("8xH1000", "did you mean H100"),
        ("8xQuantum", "known are"),
        ("8 H100", "8xH100"),
        ("", "8xH100"),
        ("0xH100", "from 1 to"),
        ("9999999xH100", "from 1 to"),
        ("8xH100:wifi", "ib400"),
        ("laptop:0GiB", "not a size"),
        ("missing.toml", "cannot read"),
    ],
)
def test_what_makes_no_sense_is_one_clear_line(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as refused:
        parse_cluster(text)
    assert "\n" not in str(refused.value)


def test_a_file_describes_a_device_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'count = 4\ndisk_gb = 2.5\nhost_memory = "64GiB"\n[device]\nname = "mine"\ntflops = 10\nbandwidth_gb = 100\n'
        'memory = "24GiB"\nnetwork_gbit = 80\nnode_size = 2\ndollars_per_hour = [0.1, 0.2]\n'
    )
    cluster = parse_cluster(str(path))
    assert (cluster.name, cluster.count, cluster.node_size, cluster.disk) == ("mine", 4, 2, 2.5e9)
    assert cluster.device.peak("bfloat16") == 1e13
    assert (cluster.device.network, cluster.host_memory) == (1e10, 64 * 2**30)
    path.write_text('cluster = "16xH100:ib400"\n')
    assert parse_cluster(str(path)).count == 16


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("count = 2\n", "either"),
        ('[device]\nname = "x"\n', "missing device.tflops"),
        ("cluster = 3\n", "text"),
        ("nonsense", "does not parse"),
        ('[device]\nname="x"\ntflops=1\nbandwith_gb=1\nmemory="1GiB"\n', "did you mean bandwidth_gb"),
        ('[device]\nname="x"\ntflops=-1\nbandwidth_gb=1\nmemory="1GiB"\n', "tflops"),
    ],
)
def test_a_wrong_file_names_the_key(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=words):
        parse_cluster(str(path))


def test_every_device_has_a_source_and_numbers_of_the_right_size() -> None:
    for device in DEVICES.values():
        assert device.source
        assert 1e11 < device.peak("bfloat16") < 1e16
        assert 1e10 < device.bandwidth < 2e13, device.name
        assert device.peak("bfloat16") / device.bandwidth > 5, "fewer operations than bytes"
        low, high = device.dollars_per_hour
        assert 0 <= low <= high
        assert find_device(device.name.upper()) is device
