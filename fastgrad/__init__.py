"""fastgrad: measure where a model's gradient is concentrated, and train only there.

Public names are loaded when first used, so that ``import fastgrad`` costs nothing and needs no
optional package.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "BatchChooser": "online",
    "BlockGrid": "blocks",
    "Blueprint": "blueprint",
    "BlueprintLog": "blueprint_log",
    "CostModel": "resources",
    "Coverage": "stats",
    "FlopPlanner": "flops",
    "GradientStats": "stats",
    "JointCost": "joint",
    "JointSelection": "jointly",
    "MassMatrix": "mass",
    "MemoryPlanner": "planner",
    "Meter": "meter",
    "Partial": "partial",
    "PrivateNorms": "privacy",
    "Probe": "probe",
    "ProxyReport": "proxy_report",
    "Reselection": "reselection_schedule",
    "Selection": "selection",
    "ShardReader": "stats_shards",
    "ShardWriter": "stats_shards",
    "SparseAdamW": "optim",
    "TrainingState": "sharded",
    "adam_preconditioned": "directions",
    "compare_meters": "meter_compare",
    "diverse_top": "scores",
    "example_scores": "scores",
    "gather": "distributed",
    "gradient_direction": "directions",
    "influence_report": "influence",
    "k_star": "resources",
    "load_delta": "delta",
    "load_partial": "partial_state",
    "make_partial": "partial",
    "merge_delta": "delta_merge",
    "plan_flops": "flops",
    "plan_memory": "planner",
    "private_norms": "privacy",
    "proxy_quality": "proxy",
    "save_delta": "delta",
    "select": "choosing",
    "select_jointly": "jointly",
    "stack_deltas": "delta_stack",
    "step_in_backward": "in_backward",
    "weights_hash": "identity",
}
_MODULES = ("distributed", "errors", "heavytail", "integrations", "plots")

__all__ = ["__version__", *sorted(_PUBLIC), *_MODULES]

if TYPE_CHECKING:
    from fastgrad import (
        distributed as distributed,
    )
    from fastgrad import (
        errors as errors,
    )
    from fastgrad import (
        heavytail as heavytail,
    )
    from fastgrad import (
        integrations as integrations,
    )
    from fastgrad import (
        plots as plots,
    )
    from fastgrad.blocks import BlockGrid as BlockGrid
    from fastgrad.blueprint import Blueprint as Blueprint
    from fastgrad.blueprint_log import BlueprintLog as BlueprintLog
    from fastgrad.choosing import select as select
    from fastgrad.delta import load_delta as load_delta
    from fastgrad.delta import save_delta as save_delta
    from fastgrad.delta_merge import merge_delta as merge_delta
    from fastgrad.delta_stack import stack_deltas as stack_deltas
    from fastgrad.directions import adam_preconditioned as adam_preconditioned
    from fastgrad.directions import gradient_direction as gradient_direction
    from fastgrad.distributed import gather as gather
    from fastgrad.flops import FlopPlanner as FlopPlanner
    from fastgrad.flops import plan_flops as plan_flops
    from fastgrad.identity import weights_hash as weights_hash
    from fastgrad.in_backward import step_in_backward as step_in_backward
    from fastgrad.influence import influence_report as influence_report
    from fastgrad.joint import JointCost as JointCost
    from fastgrad.jointly import JointSelection as JointSelection
    from fastgrad.jointly import select_jointly as select_jointly
    from fastgrad.mass import MassMatrix as MassMatrix
    from fastgrad.meter import Meter as Meter
    from fastgrad.meter_compare import compare_meters as compare_meters
    from fastgrad.online import BatchChooser as BatchChooser
    from fastgrad.optim import SparseAdamW as SparseAdamW
    from fastgrad.partial import Partial as Partial
    from fastgrad.partial import make_partial as make_partial
    from fastgrad.partial_state import load_partial as load_partial
    from fastgrad.planner import MemoryPlanner as MemoryPlanner
    from fastgrad.planner import plan_memory as plan_memory
    from fastgrad.privacy import PrivateNorms as PrivateNorms
    from fastgrad.privacy import private_norms as private_norms
    from fastgrad.probe import Probe as Probe
    from fastgrad.proxy import proxy_quality as proxy_quality
    from fastgrad.proxy_report import ProxyReport as ProxyReport
    from fastgrad.reselection_schedule import Reselection as Reselection
    from fastgrad.resources import CostModel as CostModel
    from fastgrad.resources import k_star as k_star
    from fastgrad.scores import diverse_top as diverse_top
    from fastgrad.scores import example_scores as example_scores
    from fastgrad.selection import Selection as Selection
    from fastgrad.sharded import TrainingState as TrainingState
    from fastgrad.stats import Coverage as Coverage
    from fastgrad.stats import GradientStats as GradientStats
    from fastgrad.stats_shards import ShardReader as ShardReader
    from fastgrad.stats_shards import ShardWriter as ShardWriter


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"fastgrad.{_PUBLIC[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"fastgrad.{name}")
    raise AttributeError(f"module 'fastgrad' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
