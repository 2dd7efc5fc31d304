"""Ray Data as training uses it."""

import time

import pytest
import ray.data

from medray.execution import cluster


@pytest.mark.usefixtures("cluster")
def test_its_loop_rests_while_nobody_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0
    rest = cluster._Rest.on_execution_step

    def counted(self: cluster._Rest, executor: object) -> None:
        nonlocal steps
        steps += 1
        rest(self, executor)

    monkeypatch.setattr(cluster._Rest, "on_execution_step", counted)
    with cluster.streaming(block_bytes=1, in_order=True):
        rows = iter(
            ray.data.range(64, override_num_blocks=16)
            .map_batches(lambda batch: batch, batch_size=None, num_cpus=0.25)
            .iter_batches(batch_size=None, prefetch_batches=2)
        )
        first = next(rows)["id"].tolist()
        time.sleep(1)
        before = steps
        time.sleep(2)
        meanwhile = steps - before
        rest_of_them = [i for batch in rows for i in batch["id"].tolist()]
    assert first + rest_of_them == list(range(64))
    assert meanwhile <= 2 / cluster._STEP_S + 1
    assert cluster._Rest not in (
        ray.data.DataContext.get_current().custom_execution_callback_classes
    )
