"""The benchmarks of the peers: all contestants do the same work."""

import jax
import numpy as np
import page
import peers
import pytest
import update_step
from compiled_steps import abstract_arguments
from models.gpt2 import make_job


def test_the_four_scalers_train_alike():
    job = update_step.make_job(width=16, depth=2, batch=4)
    seconds, losses = update_step.measure(job, rounds=3)
    assert seconds.shape == (4, 3)
    assert np.all(seconds > 0)
    # jaxmp computes tanh in float32 inside, the others in half; they differ by a tenth
    # of float16's unit, whose roundings depend on the CPU.
    np.testing.assert_allclose(losses, losses[0], rtol=1e-4)


@pytest.fixture(scope="module")
def job():
    return make_job(4, 8, vocabulary=32, width=16, layers=1, heads=2)


@pytest.mark.slow
def test_the_peers_train_alike(job):
    losses = {}
    for peer in peers.PEERS:
        step, state = peers.start(peer, job)
        _, loss = step(state, job.batch(jax.random.key(1)))
        losses[peer] = float(loss)
    np.testing.assert_allclose(list(losses.values()), losses["mpx"], rtol=2e-3)


@pytest.mark.cpu
@pytest.mark.optimised
def test_on_the_cpu_nothing_is_computed_more_often_than_by_hand(job):
    counts = []
    for peer in (
        "`optax.apply_if_finite`",
        "jaxmp, `autocast`",
        "jaxmp, `apply_policy`",
    ):
        training = peers.PEERS[peer](job)
        step = jax.jit(training.step, donate_argnums=0)
        text = step.lower(*abstract_arguments(training, job)).compile().as_text()
        counts.append([text.count(f" {op}(") for op in ("dot", "tanh", "exponential")])
    assert min(counts[0]) > 0
    assert counts[1] == counts[2] == counts[0]


def test_a_peer_that_breaks_is_a_row(job, monkeypatch):
    def broken(job):
        raise TypeError("it is\nbroken")

    monkeypatch.setattr(peers, "PEERS", {"good": peers.PEERS["mpx"], "bad": broken})
    cells = peers.cpu_columns(job, rounds=2)
    assert cells["CPU time per step (quartiles)"] == [
        "1.00 (1.00 to 1.00)",
        "TypeError: it is broken",
    ]
    times = peers.ratios(peers.least_seconds_to_lower(job, 1).values(), "s")
    assert times[0].startswith("1.00 (")
    assert times[1] == "TypeError: it is broken"


def test_ratios_are_to_the_least():
    assert peers.ratios([3.0, "error", 2.0], "GiB") == [
        "1.50 (3 GiB)",
        "error",
        "1.00 (2 GiB)",
    ]


def test_a_section_of_a_page_is_replaced(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("before\n<!-- a -->\nold\n<!-- end of a -->\nafter\n")
    page.write_section(path, "a", "\nnew \\1\n")
    expected = "before\n<!-- a -->\nnew \\1\n<!-- end of a -->\nafter\n"
    assert path.read_text() == expected
    with pytest.raises(ValueError, match="has 0 sections"):
        page.write_section(path, "b", "new")
