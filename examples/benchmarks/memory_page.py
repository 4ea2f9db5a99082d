"""The tables and charts of what precision saves, for the documentation."""

import pathlib

from compiled_steps import COMPILER_OPTIONS, FLOAT32, ways_for
from models import JOBS

from jaxmp._views.tables import markdown_table
from jaxmp.report import chips

GIB = 2.0**30
MIB = 2.0**20
# What overviews of mixed precision quote: memory saved, and times as fast.
CLAIMS = {
    "BERT-Base": (0.47, 1.6),
    "GPT-2 small": (0.51, 1.8),
    "ResNet-50": (0.45, 1.4),
    "Transformer-XL base": (0.52, 1.9),
}
JAXMP = ("bfloat16 autocast", "bfloat16 apply_policy")
COLORS = {
    FLOAT32: "#c9c9c9",
    "bfloat16 by hand": "#edae49",
    "bfloat16 jmp": "#d1495b",
    "bfloat16 apply_policy": "#66a182",
    "bfloat16 autocast": "#00798c",
}


def page_section(rows, charts):
    """Writes everything that the rows tell.

    Args:
      rows: maps (model, way, target) to a `Row`.
      charts: names of the files of the charts, by what they show.
    """
    targets = list(dict.fromkeys(target for _, _, target in rows))
    parts = ["### Against the figures that are quoted", headline(rows)]
    parts += [f"![memory of a training step]({charts['memory']})"]
    if "traffic" in charts:
        parts += [f"![traffic of a training step]({charts['traffic']})"]
    for model, job in JOBS.items():
        if not any(key[0] == model for key in rows):
            continue
        parts += [f"### {model}: {job.shape}"]
        for target in targets:
            if found := rows_of(rows, model, target):
                parts += [f"On {chips[target].name}:", table(found)]
                parts += notes(model, target, found)
            else:
                parts += [f"Nothing was compiled for {chips[target].name}."]
        parts += shortfall(rows, model)
    return "\n\n".join(parts)


def rows_of(rows, model, target):
    return {
        way: rows[model, way, target]
        for way in ways_for(model, target)
        if (model, way, target) in rows
    }


def saved(row, reference, name="peak"):
    """The part of float32's bytes that a row does without."""
    if row is None or reference is None:
        return None
    used, all_of_it = getattr(row, name), getattr(reference, name)
    return None if not used or not all_of_it else 1 - used / all_of_it


def speed_up(row, reference):
    if None in (row, reference) or None in (row.roofline, reference.roofline):
        return None
    return reference.roofline.seconds / row.roofline.seconds


def best_of_jaxmp(rows, model, target):
    """The way of jaxmp that needs the least memory, in bfloat16."""
    found = {w: rows[model, w, target] for w in JAXMP if (model, w, target) in rows}
    fitting = {way: row for way, row in found.items() if row.peak is not None}
    return min(fitting, key=lambda way: fitting[way].peak, default=None)


def headline(rows):
    """One line per model: what is quoted, and what the H100's compiler says."""
    lines = []
    for model, (claim, claimed_speed) in CLAIMS.items():
        way = best_of_jaxmp(rows, model, "h100")
        if way is None or (model, FLOAT32, "h100") not in rows:
            continue
        reference = rows[model, FLOAT32, "h100"]
        row = rows[model, way, "h100"]
        hand = rows.get((model, "bfloat16 by hand", "h100"))
        part = saved(row, reference)
        lines.append(
            (
                model,
                percent(claim),
                percent(saved(hand, reference)),
                f"{percent(part)} ({way.split()[1]})",
                "yes" if part >= claim else f"no, by {100 * (claim - part):.1f} points",
                claimed_speed,
                show(speed_up(hand, reference), "{:.2f}"),
                show(speed_up(row, reference), "{:.2f}"),
            )
        )
    columns = (
        "memory on the H100",
        "quoted",
        "by hand",
        "jaxmp",
        "reached",
        "speed-up quoted",
        "by hand*",
        "jaxmp*",
    )
    return markdown_table(columns, lines)


def table(found):
    """All ways of a model on a target."""
    reference = found.get(FLOAT32)
    has_traffic = any(row.accessed for row in found.values())
    lines = []
    for way, row in found.items():
        estimate = row.roofline and 1e3 * row.roofline.seconds
        cells = [way]
        if row.peak is None:
            cells += ["does not fit", ""]
        else:
            cells += [f"{row.peak / GIB:.2f}", percent(saved(row, reference))]
        if has_traffic:
            traffic = row.accessed and row.accessed / GIB
            cells += [show(traffic, "{:.1f}")]
            cells += [percent(saved(row, reference, "accessed"))]
        cells += [show(estimate, "{:.1f}"), show(speed_up(row, reference), "{:.2f}")]
        lines.append(cells)
    traffic = ["traffic GiB", "saved"] if has_traffic else []
    columns = ["", "memory GiB", "saved", *traffic, "ms at least*", "speed-up*"]
    return markdown_table(columns, lines)


def notes(model, target, found):
    """What a reader of a table has to know, and what is missing from it."""
    told = []
    if options := COMPILER_OPTIONS.get((model, target)):
        shown = ", ".join(f"`{name}={value}`" for name, value in options.items())
        told.append(f"Compiled with {shown}.")
    if any(row.peak and row.roofline is None for row in found.values()):
        told.append(
            "A row without an estimate: the compiler could not write its program down."
        )
    reference = found.get(FLOAT32)
    if reference is not None and reference.peak is None:
        told.append("Nothing can be compared with float32, which does not fit.")
    if missing := [way for way in ways_for(model, target) if way not in found]:
        told.append(f"Not compiled for this page: {'; '.join(missing)}.")
    return [" ".join(told)] if told else []


def shortfall(rows, model):
    """The largest buffers at the peak, where what is quoted is not reached."""
    way = best_of_jaxmp(rows, model, "h100")
    reference = rows.get((model, FLOAT32, "h100"))
    if way is None or reference is None:
        return []
    row = rows[model, way, "h100"]
    claim, _ = CLAIMS[model]
    if saved(row, reference) >= claim:
        return []
    lines = [
        (f"{buffer.bytes / MIB:.0f}", buffer.copies, buffer.array, made_at(buffer))
        for buffer in row.buffers
    ]
    intro = f"What lies in the H100's memory at the peak of {way}, largest first:"
    return [intro, markdown_table(["MiB", "count", "array", "made at"], lines)]


def made_at(buffer):
    """The scopes of a buffer, without what JAX's transformations add."""
    if not buffer.source:
        return f"`{buffer.name}`"
    file = pathlib.Path(buffer.source.split(" ")[0]).name
    return f"`{buffer.name.split('/', 1)[-1]}` ({file})"


def percent(part):
    return "" if part is None else f"{round(100 * part, 1) + 0.0:.1f} %"


def show(value, form):
    return "" if not value else form.format(value)


def draw(rows, path, name, title):
    """Draws bytes relative to float32, a panel for each target.

    Returns:
      Whether there was anything to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shares = {
        key: 100 * (1 - part)
        for key, row in rows.items()
        if key[1] in COLORS
        and (part := saved(row, rows.get((key[0], FLOAT32, key[2])), name)) is not None
    }
    targets = list(dict.fromkeys(target for _, _, target in shares))
    models = [model for model in CLAIMS if any(key[0] == model for key in shares)]
    if not shares:
        return False
    pyplot.rcParams["svg.hashsalt"] = "jaxmp"
    figure, panels = pyplot.subplots(
        1,
        len(targets),
        figsize=(1.5 + 3.4 * max(len(targets), 2), 1.2 + 0.9 * len(models)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for panel, target in zip(panels[0], targets, strict=True):
        for place, model in enumerate(models):
            found = {w: shares.get((model, w, target)) for w in COLORS}
            draw_bars(panel, place, {w: x for w, x in found.items() if x is not None})
            if name == "peak" and any(found.values()):
                quoted = 100 * (1 - CLAIMS[model][0])
                panel.plot([quoted] * 2, [place - 0.45, place + 0.45], "k:")
        panel.set(title=chips[target].name, xlabel=f"{title}, % of float32")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_yticks(range(len(models)), models)
    panels[0][0].invert_yaxis()
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=color) for color in COLORS.values()]
    labels = list(COLORS)
    if name == "peak":
        handles.append(pyplot.Line2D([], [], color="k", linestyle=":"))
        labels.append("quoted")
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, metadata={"Date": None} if str(path).endswith("svg") else {})
    pyplot.close(figure)
    return True


def draw_bars(panel, place, shares):
    """Draws the bars of a model, packed around its place."""
    height = 0.8 / len(COLORS)
    top = place - height * len(shares) / 2
    for i, (way, share) in enumerate(shares.items()):
        y = top + (i + 0.5) * height
        panel.barh(y, share, height, color=COLORS[way])
        ink = "black" if way in (FLOAT32, "bfloat16 by hand") else "white"
        panel.text(2, y, f"{share:.0f}", va="center", fontsize=7, color=ink)
