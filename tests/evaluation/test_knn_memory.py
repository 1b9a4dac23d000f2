"""The memory that k-NN takes with a bank of the size of ImageNet, in a process of its own."""

import json
import subprocess
import sys

import pytest

BANK, FEATURES, QUERIES = 1_280_000, 384, 1_000
PROGRAM = f"""
import json, resource, torch
from dino.evaluation import knn_classify

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

torch.manual_seed(0)
centers = torch.randn(1000, {FEATURES})
labels = torch.arange({BANK}) % 1000
bank = torch.empty({BANK}, {FEATURES}, dtype=torch.float16)
for first in range(0, {BANK}, 20_000):
    rows = slice(first, first + 20_000)
    bank[rows] = (centers[labels[rows]] + torch.randn(20_000, {FEATURES})).half()
query_labels = torch.arange({QUERIES}) % 1000
queries = centers[query_labels] + torch.randn({QUERIES}, {FEATURES})
before = peak()
results = knn_classify(bank, labels, queries, query_labels, 1000, [10, 20, 100, 200])
print(json.dumps({{"before": before, "after": peak(), "top1": results[20].top1}}))
"""


@pytest.mark.slow
def test_a_bank_of_a_million_rows_takes_little_more_than_itself() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    print(f"peak {found['after']:.2f} GiB, before the search {found['before']:.2f} GiB")  # pytest -s shows it
    assert found["before"] > BANK * FEATURES * 2 / 2**30  # the bank itself, in 16 bits
    assert found["after"] - found["before"] < 0.3
    assert found["top1"] > 99
