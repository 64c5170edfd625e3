"""What a blueprint says, as text for people."""

from __future__ import annotations

import numpy as np

from fastgrad.blueprint_schema import BlueprintFile, Fits, KStarEntry, Lorenz, Measured, Submodule
from fastgrad.printable import printable
from fastgrad.release_noise import above_noise, in_noise, is_noised
from fastgrad.resources import OVER_AGGRESSIVE_SHARE


def describe(file: BlueprintFile) -> str:
    """What a blueprint says, as text; what its strings would do to a terminal is escaped."""
    return "\n".join(printable(line) for line in _lines(file))


def kept(k: KStarEntry) -> str:
    """What k* keeps of the squared gradient, by which curve, and whether that is too little.

    The measured curve counts where its share is known: files of before warn by the fit's.
    """
    least = OVER_AGGRESSIVE_SHARE if k.over_aggressive_share is None else k.over_aggressive_share
    share, curve, little = k.kept_share, "the fit", k.over_aggressive
    if k.curve_share is not None:
        share, curve, little = k.curve_share, "the measured curve", k.curve_share < least
    warning = f"over-aggressive, less than {least:.0%}: " if little else ""
    return f"{warning}keeps {share:.0%} by {curve}"


def _lines(file: BlueprintFile) -> list[str]:
    model, data, noise = file.model, file.data, file.noise
    lines = [
        f"model      {model.class_name or 'unknown class'} {model.name_or_path or ''} "
        f"{model.n_parameters:,} parameters, weights {(model.weights_hash or 'not hashed')[:23]}",
        f"data       {', '.join(file.domain_tags) or 'no domain tag'}: {data.n_examples:,} "
        f"examples in {data.n_batches:,} batches, {_or_unknown(data.n_label_tokens)} label tokens",
        *_concentration(file.fits),
    ]
    if is_noised(file):
        p = file.privacy
        lines.append(
            f"privacy    {p.mechanism}: epsilon {_number(p.epsilon)}, delta {_number(p.delta)} for "
            f"one {p.unit} ({p.adjacency}); noise {_number(p.noise_std)} on each norm"
        )
        lines.append(f"           {in_noise(file)}")
    if file.fits is None:
        lines.append(f"released   {file.privacy.released} of the submodules' rms alone")
    for name, k in file.k_star.items():
        lines.append(f"k*         {k.value:.1%} for {name} ({kept(k)}): {k.reason}")
        if k.paper is not None:
            lines.append(
                f"           the paper's closed forms, for comparison: gamma {k.paper.gamma:.3f}, "
                f"k* {k.paper.value:.1%}"
            )
    scale = noise.noise_scale_reason if noise.noise_scale is None else f"{noise.noise_scale:,.1f}"
    r = noise.split_half_reliability
    lines.append(
        f"noise      scale {scale}; "
        + ("no split halves" if r is None else
           f"halves ({r.n} {r.basis}) agree to Spearman {r.spearman:.2f}, top-20 % Jaccard "
           f"{r.top_jaccard:.2f}")
    )  # fmt: skip
    if file.merge is not None:
        lines.append(
            f"merged     from {len(file.merge.sources)} measurements; not known of the whole: "
            + (", ".join(sorted(file.merge.not_merged)) or "nothing")
        )
    if file.domains:
        others = "; ".join(
            f"{', '.join(d.domain_tags)} ({d.data.n_examples:,} examples)" for d in file.domains
        )
        lines.append(f"domains    this one ({', '.join(file.domain_tags)}); {others}")
    if file.blend is not None:
        lines.append(f"blend      {file.blend.blend_weight:.2f} released, {file.blend.rule}")
    counts = {
        status: sum(s.coverage == status for s in file.submodules)
        for status in ("exact", "unused", "frozen", "missing")
    }
    lines.append(
        "coverage   " + ", ".join(f"{n} {status}" for status, n in counts.items() if n)
        + f"; {len(file.dead)} dead"
    )  # fmt: skip
    if file.fits is None:
        return [*lines, "", *_first(file)]
    return [*lines, "", *_highest(file)]


def by_rms(file: Measured) -> list[tuple[Submodule, bool]]:
    """Submodules by rms, the highest first, and whether each is in the noise of a private release:
    its rms, and so its place, is then mostly noise."""
    above = above_noise(file) or {}
    known = sorted((s for s in file.submodules if s.rms is not None), key=lambda s: -(s.rms or 0.0))
    return [(s, not above.get(s.name, True)) for s in known]


def _highest(file: BlueprintFile, most: int = 10) -> list[str]:
    shown = by_rms(file)[:most]
    width = max((len(s.name) for s, _ in shown), default=0)
    lines = [f"{'highest rms':<{width}}  {'rms':>9}  {'norm':>9}  {'share':>6}  elements"]
    size = max((len(f"{s.numel:,}") for s, _ in shown), default=0)
    lines += [
        f"{s.name:<{width}}  {s.rms or 0:>9.3g}  {s.grad_norm or 0:>9.3g}  {s.share or 0:>6.1%}  "
        + (f"{s.numel:<{size},}  in the noise" if noise else f"{s.numel:,}")
        for s, noise in shown
    ]
    return lines


def _concentration(fits: Fits | None) -> list[str]:
    if fits is None:
        return []
    fit, tail = fits.squared_norm, fits.norm.tail
    lines = [
        "mass       top 10 % / 20 % / 50 % of the parameters hold "
        + " / ".join(f"{_share_at(fit.lorenz, k):.0%}" for k in (0.1, 0.2, 0.5))
        + " of the squared gradient norm",
        f"gamma      {fit.gamma.gamma:.3f} for ‖g‖², {fits.norm.gamma.gamma:.3f} for ‖g‖",
    ]
    if tail is not None:
        exponent = "" if tail.rank_exponent is None else f"rank exponent {tail.rank_exponent:.2f}, "
        lines.append(f"power law  {exponent}{tail.verdict}: {tail.reason}")
    return lines


def _first(file: BlueprintFile) -> list[str]:
    """The ten highest of a coarse file, with their rank or decile."""
    known = [s for s in file.submodules if s.rank is not None or s.decile is not None]
    best = sorted(known, key=lambda s: s.rank or s.decile or 0)[:10]
    width = max((len(s.name) for s in best), default=0)
    head = f"{'highest rms':<{width}}  {file.privacy.released}  elements"
    return [head, *(f"{s.name:<{width}}  {s.rank or s.decile:>6}  {s.numel:,}" for s in best)]


def _share_at(curve: Lorenz, k: float) -> float:
    return float(np.interp(k, curve.k, curve.share))


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g}"


def _or_unknown(value: int | None) -> str:
    return "unknown" if value is None else f"{value:,}"
