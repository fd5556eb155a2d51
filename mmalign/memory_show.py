"""`mmalign train --dry-run` for people: the estimate of a run as tables."""

from __future__ import annotations

from collections.abc import Iterator

from mmalign.memory_estimate import Estimate


def show(found: Estimate) -> None:
    """Print the estimate."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(found.summary, highlight=False)
    parts = Table("part", "parameters", "trained", "dtype", "bytes", "where", title="weights", title_justify="left")
    for part in found.parts:
        trained = f"{part.trained:,}" if part.trained else ""
        where = "CPU memory, lent to the device" if part.waits else "device"
        parts.add_row(part.name, f"{part.parameters:,}", trained, ", ".join(part.dtypes), size(part.bytes), where)
    console.print(parts)
    console.print(_shapes(found))
    pieces = Table("piece", "bytes", "", title="beside the weights", title_justify="left")
    for row in _pieces(found):
        pieces.add_row(*row)
    console.print(pieces)
    phases = Table("phase", "device memory", title="peak of each phase", title_justify="left")
    for name, value in found.phases.items():
        phases.add_row(name, size(value))
    console.print(phases)
    for line in sentences(found):
        console.print(line, highlight=False)


def _shapes(found: Estimate) -> object:
    from rich.table import Table

    table = Table("shape", "items", "latents", "tokens", title="what items are cut to", title_justify="left")
    for bucket in found.buckets:
        latents = " x ".join(map(str, bucket.latents))
        table.add_row(bucket.name, f"{bucket.items:,}", latents, f"{bucket.tokens:,}")
    return table


def _pieces(found: Estimate) -> Iterator[tuple[str, str, str]]:
    yield "gradients", size(found.gradients), ""
    yield "optimiser", size(found.optimiser), ""
    for name, value in (("average (ema)", found.average), ("earlier weights", found.copies)):
        if value:
            yield name, size(value), ""
    if found.reference:
        yield "reference", size(found.reference), "a second denoiser"
    rows = f"{found.rows} {'rows' if found.rows > 1 else 'row'}"
    for name, wanted in (("plain", False), ("checkpointed", True)):
        if name not in found.steps:
            continue
        step = found.steps[name]
        used = "this run" if found.checkpointing == wanted else f"with gradient_checkpointing: {str(wanted).lower()}"
        yield f"activations, {name}", size(step.activations), f"{rows}; peak of the step {size(step.peak)}; {used}"
    once = "until embeddings and latents are cached" if found.cached else "in every step"
    for what, encoding in (("text", found.text), ("pictures", found.latents)):
        if encoding is not None:
            yield f"encoding {what}", size(encoding.peak), once


def sentences(found: Estimate) -> list[str]:
    """Work and total."""
    step, count = found.step, found.accumulate
    asked = "reference (until its errors are cached)" if found.errors_cached else "reference"
    work = {"forward": step.forward_flops, asked: step.reference_flops, "backward": step.backward_flops}
    told = ", ".join(f"{name} {flops(value * count)}" for name, value in work.items() if value)
    if found.latents is not None:
        encoding = flops((found.rows if found.cached else 1) * found.latents.flops * count)
        told += f"; encoding its pictures {encoding}, {'once per item' if found.cached else 'in every step'}"
    worst = max(found.phases, key=lambda name: found.phases[name])
    verdict = "fits" if found.total <= found.available else "DOES NOT FIT"
    return [
        f"work of an optimiser step: {told}",
        f"estimated peak on {found.device}: {size(found.total)} (in {worst}), of {size(found.available)}: {verdict}",
    ]


def size(count: int) -> str:
    """Bytes for people."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 1 << power:
            return f"{count / (1 << power):.3g} {unit}"
    return f"{count} B"


def flops(count: int) -> str:
    """Floating-point operations for people."""
    for power, unit in ((15, "P"), (12, "T"), (9, "G")):
        if count >= 10**power:
            return f"{count / 10**power:.3g} {unit}FLOP"
    return f"{count / 10**6:.3g} MFLOP"
