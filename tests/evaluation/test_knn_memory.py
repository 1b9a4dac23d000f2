"""The memory that k-NN takes with a bank of the size of ImageNet, in a process of its own."""

import json
import subprocess
import sys

import pytest

BANK, FEATURES, QUERIES = 1_280_000, 384, 1_000
PROGRAM = f"""
import functools, json, torch
from dino.evaluation import extract_features, knn_classify
from dino.runtime import peak_memory_gib

CENTERS = torch.randn(1000, {FEATURES}, generator=torch.Generator().manual_seed(0))

class Simulated:
    num_images = {BANK}

    def __iter__(self):  # the class of an image in the place of its pixels
        for labels in (torch.arange({BANK}) % 1000).split(10_000):
            yield labels.view(-1, 1, 1, 1), labels

def backbone(images):
    return CENTERS[(images.flatten() * 255).round().long()] + torch.randn(len(images), {FEATURES})

cpu = torch.device("cpu")
peak = functools.partial(peak_memory_gib, cpu)
query_labels = torch.arange({QUERIES}) % 1000
queries = CENTERS[query_labels] + torch.randn({QUERIES}, {FEATURES})
before = peak()
bank, labels = extract_features(backbone, Simulated(), cpu, mean=[0], std=[1], half_precision=True)
extracted = peak()
results = knn_classify(bank, labels, queries, query_labels, 1000, [10, 20, 100, 200])
print(json.dumps(dict(before=before, extracted=extracted, after=peak(), top1=results[20].top1)))
"""


@pytest.mark.slow
def test_a_bank_of_a_million_rows_takes_little_more_than_itself() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    words = ("before", "extracted", "after")
    print(", ".join(f"{word} {found[word]:.2f} GiB" for word in words))  # pytest -s shows it
    bank = BANK * (FEATURES * 2 + 8) / 2**30  # in 16 bits, with its labels
    assert bank < found["extracted"] - found["before"] < bank + 0.2
    assert found["after"] - found["extracted"] < 0.3
    assert found["top1"] > 99
