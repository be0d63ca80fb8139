"""Write alignkit/recipe/fields.json and adapters.json: the configuration fields of the installed TRL and PEFT.

Run by `make snapshot`. It copies what TRL, transformers and PEFT say, as JSON Schema fragments, with the ranges and
choices that TRL leaves open (`limits.json`; "typical" is shown in messages and descriptions); what alignkit adds or
refuses is in `words.py`.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
import types
import typing
from dataclasses import MISSING, Field, fields
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Union

TARGET = Path(__file__).parents[1] / "alignkit" / "recipe" / "fields.json"
ADAPTERS = TARGET.with_name("adapters.json")
_KINDS = {bool: "boolean", int: "integer", float: "number", str: "string", dict: "object", type(None): "null"}
# Choices that TRL names in a field's help only, and values it accepts but has deprecated.
_CHOICES_IN_HELP = ("loss_type", "f_divergence_type")
_DEPRECATED = {"keep_end", "chunked_nll"}
_LIMITS = json.loads(Path(__file__).with_name("limits.json").read_text(encoding="utf-8"))
_RANGES = {name: limits for names, limits in _LIMITS["limits"].items() for name in names.split()}


def take_snapshot() -> dict[str, Any]:
    """Return the fields of the five config classes; `common` holds those that are the same in all."""
    from trl import DPOConfig, GRPOConfig, KTOConfig, RewardConfig, SFTConfig

    classes = {"sft": SFTConfig, "rm": RewardConfig, "dpo": DPOConfig, "kto": KTOConfig, "ppo": GRPOConfig}
    described = {
        name: {field: _narrow(field, fragment) for field, fragment in describe_class(cls).items()}
        for name, cls in classes.items()
    }
    common = {
        field: fragment
        for field, fragment in described["sft"].items()
        if all(other.get(field) == fragment for other in described.values())
    }
    own = {
        name: {field: fragment for field, fragment in all_fields.items() if field not in common}
        for name, all_fields in described.items()
    }
    versions = {name: version(name) for name in ("trl", "transformers")}
    return {"versions": versions, "schedulers": describe_schedulers(), "common": common, **own}


def _narrow(name: str, fragment: dict[str, Any]) -> dict[str, Any]:
    """Put alignkit's range and choices on the option of the matching type."""
    fragment, limits = copy.deepcopy(fragment), dict(_RANGES.get(name, {}))
    if "typical" in limits:
        fragment["typical"] = limits.pop("typical")
    for option in fragment.get("anyOf", [fragment]):
        target = option["items"] if option.get("type") == "array" else option
        if target.get("type") in ("integer", "number"):
            target.update(limits)
        if target.get("type") == "string" and name in _LIMITS["choices"]:
            target["enum"] = list(_LIMITS["choices"][name])
    return fragment


# What alignkit sets itself in a PEFT config, and what needs parts of its own: data, other configs, Megatron.
_NO_KEYS = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "fan_in_fan_out", "bias", "init_weights", "init_lora_weights", "init_ia3_weights", "megatron_config",
    "megatron_core", "layer_replication", "alora_invocation_tokens", "use_qalora", "qalora_group_size", "token_dim",
    "num_transformer_submodules", "num_attention_heads", "num_layers", "loftq_config",
}  # fmt: skip


def take_adapters() -> dict[str, Any]:
    """Return the fields of PEFT's config classes that a recipe may set."""
    from peft import IA3Config, LoraConfig, OFTConfig, VeraConfig

    classes = {"lora": LoraConfig, "vera": VeraConfig, "oft": OFTConfig, "ia3": IA3Config}
    described = {
        kind: {
            name: field | ({"anyOf": sorted(field["anyOf"], key=str)} if "anyOf" in field else {})
            for name, field in describe_class(cls).items()
            if name not in _NO_KEYS and not re.search(r"_config$|^use_bd", name)
        }  # typing keeps one object for a union, in the order of whoever named it first
        for kind, cls in classes.items()
    }
    return {"versions": {"peft": version("peft")}, **described}


def describe_schedulers() -> dict[str, dict[str, Any]]:
    """Return what lr_scheduler_kwargs may hold for each schedule: name -> its default, or "required"."""
    from torch.optim.lr_scheduler import ReduceLROnPlateau
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, GreedyLR

    given = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    own: dict[str, Any] = {"reduce_lr_on_plateau": ReduceLROnPlateau, "greedy": GreedyLR}
    return {
        kind.value: {
            name: "required" if parameter.default is parameter.empty else parameter.default
            for name, parameter in inspect.signature(own.get(kind.value, function)).parameters.items()
            if name not in given
        }
        for kind, function in TYPE_TO_SCHEDULER_FUNCTION.items()
    }


def describe_class(cls: type) -> dict[str, dict[str, Any]]:
    """Return a JSON Schema fragment for every field of a config class."""
    hints = typing.get_type_hints(cls)
    return {field.name: _describe(field, hints[field.name]) for field in fields(cls) if field.init}


def _describe(field: Field[Any], hint: Any) -> dict[str, Any]:
    options = _read_type(hint)
    text = field.metadata.get("help", "") if field.metadata else ""
    choices = _find_choices(field, text)
    if choices:
        # The string among the options becomes the choice; `SchedulerType | str` means the same.
        for option in options:
            target: dict[str, Any] = option["items"] if option.get("type") == "array" else option
            if target.get("type") == "string":
                target["enum"] = choices
    fragment = options[0] if len(options) == 1 else {"anyOf": options}
    default = field.default if field.default is not MISSING else None
    if field.default_factory is not MISSING:
        default = field.default_factory()
    default = default.value if isinstance(default, Enum) else default
    return {**fragment, "default": default, "description": _shorten(text)}


def _read_type(hint: Any) -> list[dict[str, Any]]:
    """Return the JSON Schema options of a type hint; `Enum | str` is the enum, `dict | str` (argparse) a dict."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        options = [option for part in typing.get_args(hint) for option in _read_type(part)]
        kinds = [option.get("type") for option in options]
        if "object" in kinds or any("enum" in option for option in options):
            options = [option for option in options if option.get("type") != "string" or "enum" in option]
        return options
    if typing.get_origin(hint) is Literal:
        return [{"enum": list(typing.get_args(hint))}]
    if typing.get_origin(hint) is list:
        (item,) = typing.get_args(hint)
        return [{"type": "array", "items": _read_type(item)[0]}]
    kind = typing.get_origin(hint) or hint
    if isinstance(kind, type) and issubclass(kind, Enum):
        return [{"type": "string", "enum": [member.value for member in kind]}]
    return [{"type": _KINDS.get(kind, "object")}]


def _find_choices(field: Field[Any], text: str) -> list[str]:
    if field.name == "report_to":
        from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

        return ["none", *sorted(INTEGRATION_TO_CALLBACK)]
    choices = [str(choice) for choice in (field.metadata or {}).get("choices") or []]
    if not choices and field.name in _CHOICES_IN_HELP and "Possible values are" in text:
        sentence = re.split(r"\.\s", text.split("Possible values are", 1)[1])[0]
        choices = re.findall(r"`'?([a-z_]+)'?`", sentence)
    return [choice for choice in choices if choice not in _DEPRECATED]


def _shorten(text: str) -> str:
    """Return the first sentence of a help text, in one line."""
    text = " ".join(text.replace("%%", "%").split())
    first = re.split(r"(?<=[a-z0-9`)'\]])\. ", text)[0].rstrip(".")
    return first if len(first) <= 200 else first[:197] + "..."


def render(snapshot: dict[str, Any]) -> str:
    """Return the file's text: one field a line, so that a new TRL reads well in a diff."""
    parts = []
    for name, entries in snapshot.items():
        lines = [f"    {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in entries.items()]
        parts.append(f'  "{name}": {{\n' + ",\n".join(lines) + "\n  }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    for target, snapshot in ((TARGET, take_snapshot()), (ADAPTERS, take_adapters())):
        target.write_text(render(snapshot), encoding="utf-8")
        print(f"wrote {target}")
