"""How the CPU is set up for training, in a process of its own: it stays so."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import resource, torch
from moesaic.ops.device import cpu_set_up_for_training

def flags_at(address):
    inside = False
    for line in open("/proc/self/smaps"):
        if line[0] in "0123456789abcdef" and "-" in line.split()[0]:
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            inside = start <= address < end
        elif inside and line.startswith("VmFlags"):
            return line.split()
    return []

with cpu_set_up_for_training(), cpu_set_up_for_training():
    large = torch.ones(64 * 2**20)
    print("huge" if "hg" in flags_at(large.data_ptr() + 2**27) else "small")
    del large
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64 * 2**20)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10)
"""
THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(sys.platform != "linux" or not THP.exists(), reason="asks Linux for huge pages")
def test_memory_is_kept_in_huge_pages_and_takes_no_more_than_is_touched() -> None:
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    pages, faults, megabytes = result.stdout.split()
    assert pages == "huge"
    assert int(faults) < 1000, "256 MB in pages of 4 KB that were given back would be 65,536 faults"
    assert int(megabytes) < 1500
