"""Exit codes of the ``fastgrad`` command: the one table that code, help and docs/cli.md use."""

from __future__ import annotations

OK = 0
REFUSED = 1
USAGE = 2
NO = 3
UNDECIDED = 4
INTERRUPTED = 130
BROKEN_PIPE = 141

SHORT = {
    OK: "done",
    REFUSED: "refused",
    USAGE: "wrong usage",
    NO: "a check says no",
    UNDECIDED: "a check cannot tell",
    INTERRUPTED: "interrupted",
    BROKEN_PIPE: "the reader went away",
}
MEANING = {
    OK: "done; of a check: the answer is yes",
    REFUSED: "refused: one line on standard error says why and what to do",
    USAGE: "wrong usage: an unknown option, a value that cannot be read, an option that would "
    "change nothing",
    NO: "a check was made and the answer is no: validate (not a blueprint), verify (other "
    "weights), diff (they differ), staleness (drifted, or a different model)",
    UNDECIDED: "a check could not be decided: verify (the file holds no hash), staleness and "
    "nearest (the sample is too small, or too close to several domains; the noise of a private "
    "release hides it), diff (nothing says how noisy the two are, or that noise hides it)",
    INTERRUPTED: "interrupted by Ctrl-C; no file was left half written",
    BROKEN_PIPE: "whoever read the output went away, as `| head` does; quiet",
}
