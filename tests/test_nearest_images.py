"""The first samples of a result are shown with their nearest training images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from gencompare.comparison import page
from gencompare.comparison.load_runs import load_runs
from gencompare.data.digits import Digits
from gencompare.data.toy2d import Toy2D
from gencompare.evaluation.evaluate import EvaluationProtocol, evaluate
from gencompare.evaluation.extractors.extractor import IdentityExtractor
from gencompare.evaluation.metrics.neighbors import nearest_neighbors
from gencompare.evaluation.reference import quantize_split
from gencompare.image_grid import grid
from gencompare.records import RunRecord
from gencompare.tasks.runs.console import store_result


def test_nearest_neighbors_equal_a_brute_force_search() -> None:
    g = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(n, 5, generator=g, dtype=torch.float64) + 1000 for n in (4, 30))
    distance = np.linalg.norm(queries.numpy()[:, None] - keys.numpy()[None], axis=2)
    assert nearest_neighbors(queries, keys, 3).tolist() == np.argsort(distance, axis=1)[:, :3].tolist()
    assert nearest_neighbors(queries, keys[:2], 3).shape == (4, 2)


def test_a_copy_is_shown_with_its_original(tmp_path: Path) -> None:
    data = Digits()
    data.setup()
    train, test = (quantize_split(data.split(name).images, data.spec) for name in ("train", "test"))
    images = torch.cat([train[100:104], test[:300]])
    drawn: list[torch.Tensor] = []
    result = evaluate(images, data, EvaluationProtocol(extractors=(IdentityExtractor,)), on_samples=drawn.append)
    rows = result.details["nearest_training"]
    assert len(rows) == 8 and all(len(row) == 3 for row in rows)
    pixels = np.square(train.numpy().astype(float) - images[:8, None].numpy().astype(float)).sum((2, 3, 4))
    assert [pixels[k, row].tolist() for k, row in enumerate(rows)] == np.sort(pixels, axis=1)[:, :3].tolist()
    assert [row[0] for row in rows[:4]] == [100, 101, 102, 103]

    RunRecord("a", "copies", {"name": "digits"}, environment={"run_id": "1"}).save(tmp_path)
    store_result(tmp_path, result, drawn[0], data)
    (kept,) = RunRecord.load(tmp_path).results
    assert set(kept.images) == {"samples", "nearest training images"}
    shown = Image.open(tmp_path / kept.images["nearest training images"])
    order = [image for k in range(8) for image in [images[k], *train[rows[k]]]]
    assert np.array_equal(np.asarray(shown), np.asarray(grid(torch.stack(order).numpy(), 4)))
    html = page.render(load_runs([tmp_path]))
    assert "nearest training images" in html and "nearest_training" not in html and "nearest training<" not in html


def test_points_have_no_nearest_images(tmp_path: Path) -> None:
    data = Toy2D()
    data.setup()
    points = data.split("test").images[:200]
    result = evaluate(points, data, EvaluationProtocol(extractors=(IdentityExtractor,), num_images=200))
    assert "nearest_training" not in result.details
