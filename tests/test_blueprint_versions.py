"""The published JSON Schema, as a validator that is not ours reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastgrad.blueprint import Blueprint
from fastgrad.errors import BlueprintError

ROOT = Path(__file__).parent.parent
SCHEMA = json.loads((ROOT / "docs" / "blueprint.schema.json").read_text())
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*/gradient_blueprint.json"))


@pytest.fixture
def validator():
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    return jsonschema.Draft202012Validator(SCHEMA)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.parent.name)
def test_every_example_in_the_docs_is_valid(validator, path):
    validator.validate(json.loads(path.read_text()))


@pytest.mark.parametrize(
    ("version", "valid"),
    [("1.0.0", True), ("1.2.0", True), ("1.99.3", True), ("2.0.0", False), ("0.9.0", False),
     ("11.0.0", False), ("1.2", False), ("1.2.0-rc1", False), ("1.\u0662.0", False), (1, False)],
)  # fmt: skip
def test_the_schema_reads_the_versions_that_the_library_reads(validator, tmp_path, version, valid):
    document = json.loads(EXAMPLES[0].read_text()) | {"schema_version": version}
    document["block_vectors"] = None
    errors = [e.json_path for e in validator.iter_errors(document)]
    assert errors == ([] if valid else ["$.schema_version"])
    (tmp_path / "gradient_blueprint.json").write_text(json.dumps(document))
    if valid:
        Blueprint.from_pretrained(tmp_path)
        return
    with pytest.raises(BlueprintError):
        Blueprint.from_pretrained(tmp_path)


def test_a_file_of_another_shape_is_refused_by_both(validator):
    document = json.loads(EXAMPLES[0].read_text())
    document["submodules"][0]["shape"] = "wide"
    assert [e.json_path for e in validator.iter_errors(document)] == ["$.submodules[0].shape"]
