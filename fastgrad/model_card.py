"""A section about the gradient blueprint in a model card, and nothing else in it changed.

The card is read through ``huggingface_hub``'s ``ModelCard``, which knows what metadata is valid;
it is written as text, since writing it through ``ModelCard`` would put every other line of the
metadata into that library's own style. What is ours stands between two markers in the text and
between two comments in the metadata, so writing it again replaces it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgrad.blueprint_schema import FILE_NAME
from fastgrad.blueprint_text import by_rms, kept
from fastgrad.errors import BlueprintError, MissingExtraError
from fastgrad.files import atomic_path
from fastgrad.printable import printable, printable_lines
from fastgrad.release_noise import in_noise, is_noised

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fastgrad.blueprint import Blueprint

BEGIN, END = "<!-- gradient-blueprint:begin -->", "<!-- gradient-blueprint:end -->"
META_BEGIN, META_END = "# gradient-blueprint:begin", "# gradient-blueprint:end"
CARD_NAME = "README.md"
MAX_CARD_BYTES = 16 * 2**20
JOULES_PER_KWH = 3.6e6

_FRONT = re.compile(r"\A(\ufeff?\s*---[ \t]*(\r?\n))(.*?)(^---[ \t]*(?:\r?\n|\Z))",
                    re.DOTALL | re.MULTILINE)  # fmt: skip


@dataclass(frozen=True)
class Emissions:
    """Measured emissions of making the model or its blueprint, as the hub's metadata has them.

    Attributes:
        grams: of CO2 equivalent.
        source: how they were measured, in words.
        training_type: ``pre-training``, ``fine-tuning`` or what else was measured.
        location: where, for the carbon intensity of the grid.
        hardware: on what.
    """

    grams: float
    source: str
    training_type: str | None = None
    location: str | None = None
    hardware: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.grams < float("inf"):
            raise BlueprintError(
                f"emissions of {self.grams} g are impossible. Remedy: measured grams of CO2 "
                "equivalent, zero or more"
            )
        if not self.source.strip():
            raise BlueprintError(
                "emissions without a source cannot be checked. Remedy: say how they were measured"
            )

    @classmethod
    def of_energy(cls, joules: float, grams_per_kwh: float, source: str, **more: Any) -> Emissions:
        """From measured energy in J and the carbon intensity of its electricity in g/kWh."""
        return cls(joules / JOULES_PER_KWH * grams_per_kwh, source, **more)

    def metadata(self) -> dict[str, Any]:
        """The value of ``co2_eq_emissions``."""
        entries = {
            "emissions": float(f"{self.grams:.6g}"), "source": self.source,
            "training_type": self.training_type, "geographical_location": self.location,
            "hardware_used": self.hardware,
        }  # fmt: skip
        return {key: value for key, value in entries.items() if value is not None}


@dataclass(frozen=True)
class Picture:
    """A picture in the card.

    Attributes:
        file: its name in the model's folder.
        alt: what it shows, in a sentence for those who do not see it.
        caption: what follows from it, printed below it.
    """

    file: str
    alt: str
    caption: str


def write_card(
    folder: Path,
    blueprint: Blueprint,
    *,
    figures: Sequence[Picture] = (),
    emissions: Emissions | None = None,
) -> Path:
    """Write the section into ``README.md`` of ``folder``, or make that file.

    Every byte outside the markers stays; writing the same again changes nothing.

    Args:
        folder: the model's folder.
        blueprint: what the section is about.
        figures: pictures that are in ``folder``.
        emissions: measured ones; without them nothing is said of emissions.

    Returns:
        The path of the card.

    Raises:
        BlueprintError: if the card is no UTF-8 text, its metadata is not valid or speaks of
            emissions already, or its markers are damaged.
        MissingExtraError: if ``huggingface_hub`` is not installed.
    """
    path = folder / CARD_NAME
    before = path.read_bytes() if path.is_file() else None
    if before is not None and len(before) > MAX_CARD_BYTES:
        raise BlueprintError(f"{path} is larger than {MAX_CARD_BYTES} bytes, which no card is. "
                             "Remedy: check what it is")  # fmt: skip
    try:
        text = None if before is None else before.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BlueprintError(f"{path} is not UTF-8 text: {error}. Remedy: convert it") from error
    try:
        after = updated_card(text, blueprint, folder.resolve().name, figures, emissions)
    except BlueprintError as error:
        raise BlueprintError(f"{path}: {error}") from error.__cause__
    data = after.encode("utf-8")
    if data != before:
        with atomic_path(path) as temporary:
            temporary.write_bytes(data)
    return path


def updated_card(
    text: str | None,
    blueprint: Blueprint,
    title: str,
    figures: Sequence[Picture],
    emissions: Emissions | None,
) -> str:
    """The text of a card (None: a new one) with our section. See :func:`write_card`."""
    newline = "\n" if text is None else _newline(text)
    body = text if text is not None else f"# {printable(title)}\n"
    _check(body)
    body = _with_metadata(body, _metadata(blueprint, emissions), newline)
    section = newline.join([BEGIN, *section_lines(blueprint, figures, emissions), END])
    match = _FRONT.search(body)
    head = body[: 0 if match is None else match.end()]
    rest = body[len(head) :]
    counts = rest.count(BEGIN), rest.count(END)
    start, end = rest.find(BEGIN), rest.find(END)
    if counts == (0, 0):
        gap = newline if rest.endswith(newline) or not rest else newline * 2
        rest = f"{rest}{gap}{section}{newline}"
    elif counts == (1, 1) and start < end:
        rest = rest[:start] + section + rest[end + len(END) :]
    else:
        raise BlueprintError(
            f"the markers {BEGIN} and {END} are not there once each, in this order. Remedy: remove "
            "what is left of the section and its markers"
        )
    _check(head + rest)
    return head + rest


def _newline(text: str) -> str:
    found = re.search(r"\r?\n", text)
    return found.group() if found else "\n"


def _check(text: str) -> Any:
    """The card's metadata as ``huggingface_hub`` reads it."""
    try:
        import huggingface_hub
        import yaml
    except ImportError as error:
        raise MissingExtraError("huggingface_hub", "hf") from error
    try:
        match = _FRONT.search(text)
        if match is None or not match[3].strip():
            return {}
        return huggingface_hub.ModelCard(text.removeprefix("\ufeff")).data.to_dict()
    except (ValueError, TypeError, yaml.YAMLError) as error:
        line = " ".join(str(error).split())[:200]
        raise BlueprintError(
            f"the metadata between the --- lines is not valid: {line}. Remedy: mend it first"
        ) from error


def _metadata(blueprint: Blueprint, emissions: Emissions | None) -> dict[str, Any]:
    entries: dict[str, Any] = {
        "gradient_blueprint": {
            "file": FILE_NAME,
            "schema_version": blueprint.file.schema_version,
            "weights_hash": blueprint.weights_hash,
            "domain_tags": list(blueprint.domain_tags),
        }
    }
    if blueprint.file.domains:
        entries["gradient_blueprint"]["domains"] = [
            list(one.domain_tags) for one in (blueprint.file, *blueprint.file.domains)
        ]
    if emissions is not None:
        entries["co2_eq_emissions"] = emissions.metadata()
    return entries


def _with_metadata(text: str, entries: Mapping[str, Any], newline: str) -> str:
    """``text`` with our entries in its metadata block, between our comments."""
    import yaml

    match = _FRONT.search(text)
    inner = "" if match is None else match[3]
    start, end = _span(inner)
    others = yaml.safe_load(inner[:start] + inner[end:]) or {}
    for key, value in entries.items():
        if key in others and others[key] != value:
            raise BlueprintError(
                f"the metadata has a {key} of its own. Remedy: remove it there, or leave it out "
                "here"
            )
    ours = {key: value for key, value in entries.items() if key not in others}
    block = ""
    if ours:
        lines = _yaml(ours).rstrip("\n").split("\n")
        block = newline.join([META_BEGIN, *lines, META_END]) + newline
    if match is None:
        return f"---{newline}{block}---{newline}{newline}{text}" if block else text
    begin = match.start(3)
    return text[: begin + start] + block + text[begin + end :]


def _yaml(entries: Mapping[str, Any]) -> str:
    """YAML in which no string of the entries breaks a line or holds a control character."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    def scalar(dumper: Dumper, text: str) -> yaml.ScalarNode:
        # Only double quotes have escapes.
        style = None if printable(text) == text else '"'
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    Dumper.add_representer(str, scalar)
    found: str = yaml.dump(
        dict(entries), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=10**9
    )
    return printable_lines(found)  # marks of direction, whose escapes YAML has too


def _span(inner: str) -> tuple[int, int]:
    """Where our entries stand in the metadata, or would be added."""
    begins, ends = (
        list(re.finditer(rf"^{re.escape(mark)}[ \t]*(?:\r?\n|\Z)", inner, re.MULTILINE))
        for mark in (META_BEGIN, META_END)
    )
    if not begins and not ends:
        return len(inner), len(inner)
    if len(begins) != 1 or len(ends) != 1 or begins[0].start() > ends[0].start():
        raise BlueprintError(
            f"the comments {META_BEGIN} and {META_END} are not there once each, in this order, in "
            "the metadata. Remedy: remove what is left of them and what stands between"
        )
    return begins[0].start(), ends[0].end()


# -- the section ---------------------------------------------------------------------------------


def section_lines(
    blueprint: Blueprint, figures: Sequence[Picture], emissions: Emissions | None
) -> list[str]:
    """The section's lines of Markdown, without the markers."""
    file = blueprint.file
    data, provenance = file.data, file.provenance
    tokens = "" if data.n_label_tokens is None else f", {data.n_label_tokens:,} label tokens"
    domains = ", ".join(_plain(tag) for tag in file.domain_tags) or "no domain named"
    lines = [
        "## Gradient blueprint",
        "",
        f"[`{FILE_NAME}`]({FILE_NAME}) says where this model's gradient is concentrated, so that "
        "whoever adapts it can train there alone. Measured on "
        f"{domains}: {data.n_examples:,} examples in {data.n_batches:,} batches{tokens}.",
        "",
        "| | |",
        "|:--|:--|",
        *(f"| {name} | {value} |" for name, value in _findings(blueprint)),
        "",
        *_highest(blueprint),
        "",
        *_domains(blueprint),
    ]
    for picture in figures:
        lines += [f"![{_plain(picture.alt)}]({picture.file})", "", f"*{_caption(picture)}*", ""]
    lines += [
        f"**Privacy.** {_plain(file.privacy.statement)}",
        "",
        f"**Provenance.** {_plain(provenance.created)}, schema {file.schema_version}, fastgrad "
        f"{_plain(file.fastgrad_version)}; for the weights `{file.model.weights_hash or 'unknown'}`"
        + (f"; `{_plain(provenance.command)}`" if provenance.command else "") + ".",
        "",
    ]  # fmt: skip
    if emissions is not None:
        lines += [
            f"**Emissions.** {emissions.grams:.4g} g of CO2 equivalent, measured: "
            f"{_plain(emissions.source)}.",
            "",
        ]
    return [
        *lines,
        "```python",
        "import fastgrad as fg",
        f"blueprint = fg.Blueprint.from_pretrained({_reference(blueprint)!r})",
        "selection = fg.select(blueprint, model=model, fraction=0.2)",
        "```",
    ]


def _caption(picture: Picture) -> str:
    return _plain(picture.caption).replace("*", "&#42;").replace("_", "&#95;")


def _findings(blueprint: Blueprint) -> list[tuple[str, str]]:
    import numpy as np

    file = blueprint.file
    noise_row = [("privacy noise", _plain(in_noise(file)))] if is_noised(file) else []
    if file.fits is None:
        coarse = f"{_plain(file.privacy.released or '')} of the submodules' rms alone"
        return [("released", coarse), *noise_row]
    fit, tail, noise = file.fits.squared_norm, file.fits.norm.tail, file.noise
    shares = " / ".join(
        f"{np.interp(k, fit.lorenz.k, fit.lorenz.share):.0%}" for k in (0.1, 0.2, 0.5)
    )
    rows = [("top 10 % / 20 % / 50 % of the weights hold", f"{shares} of the squared gradient"),
            *noise_row]  # fmt: skip
    if tail is not None:
        rows.append(("power law", f"{tail.verdict}: {_plain(tail.reason)}"))
    for name, k in file.k_star.items():
        rows.append((f"k\\* for {_plain(name)}", f"{k.value:.1%}, {kept(k)}"))
    if noise.noise_scale is not None:
        rows.append(("gradient noise scale", f"{noise.noise_scale:,.1f} examples"))
    half = noise.split_half_reliability
    if half is not None:
        rows.append(("halves of the sample agree",
                     f"Spearman {half.spearman:.2f}, {half.n} {half.basis}"))  # fmt: skip
    return rows


def _highest(blueprint: Blueprint, n: int = 5) -> list[str]:
    if blueprint.file.fits is None:
        scores = blueprint.scores("rms")
        best = sorted(scores, key=lambda name: -float(scores[name][0]))[:n]
        sizes = {s.name: s.numel for s in blueprint.submodules}
        return ["| highest gradient per weight | weights |", "|:--|--:|",
                *(f"| `{_plain(name)}` | {sizes[name]:,} |" for name in best)]  # fmt: skip
    lines = ["| highest gradient per weight | share of the squared norm | weights |",
             "|:--|--:|--:|"]  # fmt: skip
    for s, noise in by_rms(blueprint.file)[:n]:
        mark = " (in the noise)" if noise else ""
        lines.append(f"| `{_plain(s.name)}`{mark} | {s.share or 0:.1%} | {s.numel:,} |")
    return lines


def _domains(blueprint: Blueprint) -> list[str]:
    """A table of all domains, where there are several; what stands above it is of the first."""
    if not blueprint.file.domains:
        return []
    lines = ["Measured on several domains; all above is of the first.", "",
             "| domain | examples | label tokens | highest gradient per weight |",
             "|:--|--:|--:|:--|"]  # fmt: skip
    for one in (blueprint.file, *blueprint.file.domains):
        tokens = one.data.n_label_tokens
        known = [s for s, _ in by_rms(one) if s.rms]
        lines.append(
            f"| {_plain(', '.join(one.domain_tags)) or 'no tag'} | {one.data.n_examples:,} | "
            f"{'unknown' if tokens is None else format(tokens, ',')} | "
            + ", ".join(f"`{_plain(s.name)}`" for s in known[:2]) + " |"
        )  # fmt: skip
    return [*lines, ""]


def _reference(blueprint: Blueprint) -> str:
    from fastgrad.hub import is_repo_id

    name = blueprint.file.model.name_or_path or ""
    return name if is_repo_id(name) else "path/to/this/model"


def _plain(text: str) -> str:
    """Text of the file as one line that Markdown, a table or our own markers do not trip over."""
    line = printable(" ".join(text.split()))
    return re.sub(r"([<>|`\\\[\]])", lambda m: f"&#{ord(m[1])};", line)[:500]
