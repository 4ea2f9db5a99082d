"""What the figures show is what was measured; that they look well was looked at."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib.figure import Figure

import jaxmp
from jaxmp.errors import MissingPackage, NotOnHost, NumericsError
from jaxmp.numerics import (
    monitor,
    monitor_report,
    plot_exponents,
    plot_loss_scale,
    plot_underflow,
    statistics,
)

GRADS = {
    "tiny": jnp.array([0.0, 2.0**-30, 2.0**-20, 2.0**-20, 2.0**-20]),
    "large": jnp.array([2.0**17, 1.0, jnp.nan]),
}
PARAMS = {
    "tiny": jnp.ones(5, jnp.bfloat16),
    "large": jnp.ones(3),
}


def reports(sizes=(1.0, 2.0**-10), every=1):
    tx = monitor(optax.sgd(2.0**-3), every=every)
    state, found = tx.init(PARAMS), []
    for size in sizes:
        grads = jax.tree.map(lambda g, size=size: g * size, GRADS)
        _, state = tx.update(grads, state, PARAMS)
        found.append(monitor_report(state))
    return found


# Reports


def test_a_report_counts_under_the_loss_scale_that_it_is_asked_about():
    tx = monitor(jaxmp.loss_scaling(optax.sgd(0.1), "mixed_float16"), every=1)
    params = jax.tree.map(jnp.ones_like, GRADS)
    _, state = tx.update(GRADS, tx.init(params), params)
    scaled = {row.path: row for row in monitor_report(state).rows}
    assert monitor_report(state).loss_scale == 2.0**15  # NaN: it backed off
    assert scaled["tiny"].zero == scaled["tiny"].underflow + 0.2 == 0.2
    assert scaled["tiny"].subnormal == 0.2
    assert scaled["large"].overflow == pytest.approx(1 / 3)
    plain = {row.path: row for row in monitor_report(state, loss_scale=1).rows}
    assert plain["tiny"].underflow == 0.2
    assert plain["tiny"].subnormal == pytest.approx(0.6)
    wide = {row.path: row for row in monitor_report(state, dtype="bfloat16").rows}
    assert wide["large"].overflow == wide["tiny"].underflow == 0


def test_a_report_prints_the_worst_first_and_says_what_to_do():
    report = reports()[0]
    assert [row.path for row in report.worst()] == ["large", "tiny"]
    assert [row.path for row in report.worst(1)] == ["large"]
    text = str(report)
    lines = text.splitlines()
    assert lines[0].startswith("Step 1: gradients in float16 under the loss scale 1")
    assert lines[2].startswith("large")
    assert "Gradients become zero in float16" in text
    assert "Gradients overflow in float16" in text
    assert "jaxmp.master_weights(optimizer)" in text
    assert "Step 1 had non-finite gradients in large (1)." in text
    assert "Lower the learning rate" in text


def test_a_healthy_report_warns_of_nothing():
    tx = monitor(optax.sgd(0.01), every=1)
    params = {"w": jnp.ones(4)}
    _, state = tx.update(params, tx.init(params), params)
    assert monitor_report(state).warnings == []


def test_a_layer_without_gradients_is_named():
    tx = monitor(optax.sgd(0.01), every=1)
    params = {"dead": jnp.ones(4), "alive": jnp.ones(2)}
    grads = {"dead": jnp.zeros(4), "alive": jnp.ones(2)}
    _, state = tx.update(grads, tx.init(params), params)
    assert monitor_report(state).warnings == ["Every gradient is zero: dead."]


def test_rows_are_dictionaries_of_numbers():
    rows = reports()[1].to_rows()
    assert {row["path"] for row in rows} == {"tiny", "large"}
    assert all(row["step"] == 2 for row in rows)
    kinds = {type(value) for row in rows for value in row.values()}
    assert kinds == {str, int, float}


def test_a_report_of_many_leaves_shows_twenty():
    params = {f"w{i}": jnp.ones(1) for i in range(23)}
    tx = monitor(optax.sgd(0.1), every=1)
    _, state = tx.update(params, tx.init(params), params)
    assert "... and 3 more: to_rows()" in str(monitor_report(state))


def test_a_report_before_the_first_measured_step():
    report = reports(every=9)[0]
    assert str(report) == "monitor: no step was measured yet."
    assert report.step == 0


def test_a_report_is_for_the_host():
    tx = monitor(optax.sgd(0.1), every=1)
    with pytest.raises(NotOnHost, match=r"get_statistics\(\)"):
        jax.jit(monitor_report)(tx.init(PARAMS))


# Exponents


def heights(ax):
    """The bars of the histogram by exponent."""
    bars = [p for p in ax.patches if round(p.get_width(), 3) == 0.9]
    bars = [bar for bar in bars if bar.get_height() > 0]
    return {round(bar.get_x()): bar.get_height() for bar in bars}


def test_the_histogram_is_the_statistics():
    ax = plot_exponents(statistics(GRADS))
    percent = 100 / 8
    wanted = {-30: percent, -20: 3 * percent, 0: percent, 17: percent}
    assert heights(ax) == pytest.approx(wanted)
    assert ax.get_ylabel() == "% of 8 numbers"
    assert ax.get_title() == "12.5 % are zero, and not drawn"


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        (1, ["normal in float16: 12.5 %", "subnormal in float16: 37.5 %"]),
        (2**10, ["2^{10}$: 50 %", "2^{10}$: 12.5 %", "2^{10}$: 12.5 %"]),
    ],
)
def test_the_legend_says_what_is_lost_under_the_scale(scale, words):
    ax = plot_exponents(statistics(GRADS), loss_scale=scale)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    for label, word in zip(labels, words, strict=False):
        assert label.endswith(word)


def test_ranges_are_drawn_with_and_without_the_scale():
    texts = [
        t.get_text() for t in plot_exponents(statistics(GRADS), loss_scale=8).texts
    ]
    assert texts == ["float16", "float16 under the loss scale $2^{3}$", "bfloat16"]
    plain = plot_exponents(statistics(GRADS)["tiny"], dtypes=["float8_e5m2"])
    assert [t.get_text() for t in plain.texts] == ["float8_e5m2"]


def test_nothing_covers_the_bars_and_every_label_is_in_the_figure():
    ax = plot_exponents(statistics(GRADS), loss_scale=2.0**15)
    ax.figure.draw_without_rendering()
    tops = [ax.transData.transform((0, h))[1] for h in heights(ax).values()]
    lowest = min(text.get_window_extent().y0 for text in ax.texts)
    assert max(tops) < lowest
    inside = ax.figure.bbox
    for artist in (*ax.texts, ax.get_legend(), ax.title, ax.xaxis.label):
        box = artist.get_window_extent()
        assert inside.x0 <= box.x0 <= box.x1 <= inside.x1
        assert inside.y0 <= box.y0 <= box.y1 <= inside.y1


# Heat map and trajectory


def test_the_heat_map_is_layer_by_step():
    found = reports()
    ax = plot_underflow([*found, found[-1]], quantity="underflow")
    shown = np.asarray(ax.images[0].get_array())
    wanted = [[100 * r.underflow for r in report.rows] for report in found]
    np.testing.assert_allclose(shown, np.transpose(wanted))
    assert [t.get_text() for t in ax.get_yticklabels()] == ["large", "tiny"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["1", "2"]
    assert ax.get_title().endswith("zero in float16 without a loss scale")


@pytest.mark.parametrize("quantity", ["subnormal", "overflow", "zero", "lost"])
def test_every_share_can_be_drawn(quantity):
    assert plot_underflow(reports(), quantity=quantity).get_title()


def test_the_trajectory_marks_skipped_steps():
    tx = jaxmp.loss_scaling(optax.sgd(0.1), "mixed_float16")
    state, history = tx.init(jnp.ones(())), []
    for grad in (1.0, jnp.inf, 1.0):
        _, state = tx.update(jnp.float32(grad), state, jnp.ones(()))
        history.append(jaxmp.loss_scale_metrics(state))
    scale, skipped = plot_loss_scale(history).lines
    assert list(scale.get_ydata()) == [2.0**16, 2.0**15, 2.0**15]
    assert list(skipped.get_xdata()) == [2]
    assert skipped.get_label() == "skipped: 1 of 3 steps"


# Files, axes, mistakes

DRAW = {
    "exponents": lambda **kw: plot_exponents(statistics(GRADS), **kw),
    "underflow": lambda **kw: plot_underflow(reports(), **kw),
    "loss_scale": lambda **kw: plot_loss_scale(
        [{"loss_scale": 8.0, "grads_finite": True}], **kw
    ),
}


@pytest.mark.parametrize("name", DRAW)
def test_figures_are_saved_and_drawn_on_given_axes(name, tmp_path):
    DRAW[name](path=tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").read_text().count("<svg") == 1
    mine = Figure().add_subplot()
    assert DRAW[name](ax=mine, path=tmp_path / "figure.png") is mine
    assert (tmp_path / "figure.png").stat().st_size > 1000


@pytest.mark.parametrize("name", DRAW)
def test_without_matplotlib(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingPackage, match="pip install matplotlib"):
        DRAW[name]()


def test_nothing_to_draw():
    with pytest.raises(NumericsError, match="of 2 numbers 2 are zero"):
        plot_exponents(statistics(jnp.zeros(2)))
    with pytest.raises(NumericsError, match="dictionary is empty"):
        plot_exponents({})
    with pytest.raises(NumericsError, match="in 0 measured steps"):
        plot_underflow([])
    with pytest.raises(NumericsError, match="'amax' to draw"):
        plot_underflow(reports(), quantity="amax")
    with pytest.raises(NumericsError, match="loss_scale_metrics"):
        plot_loss_scale([])
