"""Configurations: load a recipe, override, validate, lock, and write as JSON.

A configuration is a locked `ml_collections.ConfigDict` made by `get_config(arg="")` of a recipe
file in `configs/`. Durations are written as steps or as a share: 300, "5%", "2epochs".
"""

import ast
import difflib
import importlib
import importlib.util
import json
import math
import pkgutil
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from brgsa_jax.registry import miss

NEGATIVES = ("global", "ring", "local")
# Columns of a batch's group ids, the names `losses.*.positives` chooses from: captions of the same
# sentences; the same report, as reconstructions of one scan have; the same set of findings.
GROUPS = ("caption", "report", "findings")
# What captions are made of; the choices of data.captions.
CAPTIONS = ("summary", "report", "mixed")
# Losses of images and labels alone; every other loss reads texts.
IMAGE_LOSSES = ("classification",)
# In losses.classification.positive_weights: from how many of the training labels are positive.
PREVALENCE = "prevalence"


class UserError(Exception):
    """A mistake of the caller, told in one sentence: what, where, how to mend it.

    The command line prints the sentence without a traceback and exits with 1.
    """


def recipes() -> tuple[str, ...]:
    """Returns the names of the recipes installed as `brgsa_jax.configs`."""
    package = _recipe_package()
    found = (module.name for module in pkgutil.iter_modules(package.__path__))
    return tuple(sorted(name for name in found if not name.startswith("_")))


def _recipe_package() -> Any:
    """The installed `brgsa_jax.configs`, or `configs/` of a checkout that is only on the path."""
    try:
        return importlib.import_module("brgsa_jax.configs")
    except ModuleNotFoundError:
        folder = Path(__file__).resolve().parents[1] / "configs"
        spec = importlib.util.spec_from_file_location(
            "brgsa_jax.configs", folder / "__init__.py", submodule_search_locations=[str(folder)])
        package = importlib.util.module_from_spec(spec)
        sys.modules["brgsa_jax.configs"] = package
        spec.loader.exec_module(package)
        return package


def get_config(name: str = "phantom", /, **overrides: Any) -> ConfigDict:
    """Loads a recipe by name or file and applies overrides.

    Args:
        name: a recipe of `configs/`, a path to a Python file with `get_config(arg="")`, or a
            path to a `config.json`; "name:arg" hands `arg` to the recipe.
        **overrides: dotted keys with their new values, e.g. `**{"train.steps": 10}`.

    Returns:
        A locked ConfigDict; reading or setting an unknown key raises.

    Raises:
        UserError: unknown recipe, unknown key (nearest names are listed) or wrong type.
    """
    stem, _, arg = (name, "", "") if Path(name).is_file() else name.partition(":")
    if stem.endswith(".json"):
        config = load_json(stem)
    elif stem.endswith(".py"):
        config = _from_file(stem, arg)
    elif stem in recipes():
        module = importlib.import_module(f"{_recipe_package().__name__}.{stem}")
        config = module.get_config(arg)
    else:
        raise UserError(miss("configuration", stem, recipes()))
    config = override(config, overrides)
    return config


def _from_file(path: str, arg: str) -> ConfigDict:
    if not Path(path).is_file():
        raise UserError(f"the configuration file {path} does not exist; give an existing file "
                        f"or one of the recipes {', '.join(recipes())}")
    spec = importlib.util.spec_from_file_location("brgsa_user_config", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(f"{path} defines no get_config(arg=''); add that function")
        config = module.get_config(arg)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} cannot be used as a configuration ({type(error).__name__}: "
                        f"{error}); mend that file") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"get_config of {path} returned a {type(config).__name__}; return a "
                        "ConfigDict")
    return config


def override(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """Returns a locked copy of `config` with dotted keys changed.

    Raises:
        UserError: one message naming every unknown key with its nearest names and every value
            of the wrong type.
    """
    config = config.copy_and_resolve_references()
    config.unlock()
    known = flatten(config)
    problems = []
    for key, value in changes.items():
        if key not in known:
            problems.append(miss("configuration key", key, _visible(key, known)))
            continue
        try:
            _assign(config, key, _cast(key, value, known[key]))
        except (TypeError, ValueError, UserError) as error:
            problems.append(str(error))
    if problems:
        raise UserError("; ".join(problems))
    config.lock()
    return config


def _visible(key: str, known: Mapping[str, Any]) -> list[str]:
    """The leaves worth listing for a mistyped key: near ones of all, else its own section."""
    leaf = key.rpartition(".")[2]
    near = difflib.get_close_matches(key, known, n=5, cutoff=0.6)
    near += [k for k in known
             if difflib.get_close_matches(leaf, [k.rpartition(".")[2]], cutoff=0.7)]
    section = [k for k in known if k.startswith(key.partition(".")[0] + ".")]
    return sorted(set(near)) or section or sorted({k.partition(".")[0] for k in known})


def _assign(config: ConfigDict, key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for parent in parents:
        config = config[parent]
    with config.ignore_type():
        config[leaf] = value


def _cast(key: str, value: Any, default: Any) -> Any:
    """Casts a value to the type of the default it replaces; strings come from the shell."""
    if isinstance(value, str) and not isinstance(default, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            pass
    if isinstance(value, str) and value.lower() in ("true", "false") and isinstance(default, bool):
        value = value.lower() == "true"
    if default is None or value is None or _is_duration(default, value):
        return value
    if isinstance(default, bool) != isinstance(value, bool):
        pass
    elif isinstance(default, float) and isinstance(value, int):
        return float(value)
    elif isinstance(default, (tuple, list)) and isinstance(value, (tuple, list)):
        return tuple(value)
    elif isinstance(default, str) and _DURATION.match(default):
        value = int(value) if isinstance(value, str) and value.isdecimal() else value
        steps_of(value, total=1, per_epoch=1)
        return value
    elif isinstance(value, type(default)):
        return value
    elif isinstance(default, str):
        return str(value)
    raise TypeError(f"{key}={value!r} is a {type(value).__name__}; give a "
                    f"{type(default).__name__} such as {default!r}")


_DURATION = re.compile(r"^(\d+(?:\.\d+)?)\s*(%|epochs?|steps?)$")


def _is_duration(default: Any, value: Any) -> bool:
    texts = [v for v in (default, value) if isinstance(v, str)]
    return bool(texts) and all(isinstance(v, int) or _DURATION.match(str(v))
                               for v in (default, value))


def steps_of(duration: int | str, *, total: int, per_epoch: int) -> int:
    """Converts a duration to steps.

    Args:
        duration: steps as an int, or "300steps", "5%" of `total`, "2epochs".
        total: steps of the whole run (for "%").
        per_epoch: steps of one epoch.

    Raises:
        UserError: the text is none of these.
    """
    if isinstance(duration, int):
        return duration
    match = _DURATION.match(str(duration))
    if not match:
        raise UserError(f"the duration {duration!r} is not understood; write steps (300), a share "
                        "of the run ('5%') or epochs ('2epochs')")
    number, unit = float(match[1]), match[2]
    if unit == "%":
        return round(number / 100 * total)
    return round(number * per_epoch) if unit.startswith("epoch") else round(number)


def train_durations(config: ConfigDict, per_epoch: int) -> dict[str, int]:
    """Returns steps and intervals of section `train` as overrides in steps.

    Raises:
        UserError: `train.steps` is no positive number of steps or epochs, or `train.profile` lies
            beyond it.
    """
    section = config.train
    total = steps_of(section.steps, total=0, per_epoch=per_epoch)
    if total < 1:
        raise UserError(f"train.steps={section.steps!r} is no number of steps; write 3000 or "
                        "'20epochs'")
    if section.profile and section.profile[1] > total:
        raise UserError(f"train.profile={section.profile} goes beyond the last step, {total}; name "
                        "the first and the last step to trace")
    every = {}
    for key in ("log_every", "eval_every", "checkpoint_every"):
        found = steps_of(section[key], total=total, per_epoch=per_epoch)
        # A share of a short run may round to no step at all; only a written 0 means never.
        written = steps_of(section[key], total=10**9, per_epoch=10**9)
        every[f"train.{key}"] = max(found, 1) if written else 0
    return {"train.steps": total, **every}


def classifies(config: ConfigDict) -> bool:
    """Whether a configuration trains a classifier, so that its batches need labels."""
    return "classification" in config.losses and config.losses.classification.weight > 0


def reads_text(config: ConfigDict) -> bool:
    """Whether any loss of a configuration reads texts."""
    return any(term.weight and name not in IMAGE_LOSSES for name, term in config.losses.items())


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns {dotted key: leaf} of a nested configuration."""
    leaves = {}
    for key, value in config.items():
        path = f"{prefix}{key}"
        if isinstance(value, (ConfigDict, Mapping)):
            leaves.update(flatten(value, f"{path}."))
        else:
            leaves[path] = value
    return leaves


def parse_overrides(arguments: Sequence[str]) -> dict[str, str]:
    """Parses `--config.a.b=v` (or `--config.a.b v`) arguments of the command line.

    Raises:
        UserError: an argument of another form.
    """
    changes, rest = {}, list(arguments)
    while rest:
        argument = rest.pop(0)
        key, equals, value = argument.partition("=")
        if not key.startswith("--config."):
            raise UserError(f"unknown argument {argument!r}; change the configuration with "
                            "--config.section.key=value")
        if not equals:
            if not rest:
                raise UserError(f"{argument} needs a value: write {argument}=VALUE")
            value = rest.pop(0)
        changes[key.removeprefix("--config.")] = value
    return changes


def to_json(config: ConfigDict) -> str:
    """Serialises the resolved configuration as indented JSON with sorted keys."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def load_json(path: str | Path) -> ConfigDict:
    """Reads a configuration written by `to_json`; lists become tuples."""
    try:
        tree = json.loads(Path(path).read_text())
        if not isinstance(tree, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as a JSON configuration ({error}); give the "
                        "config.json of a work directory") from error
    return from_tree(tree)


def from_tree(tree: Mapping[str, Any]) -> ConfigDict:
    """Makes a locked ConfigDict of a nested mapping; lists become tuples."""

    def convert(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: convert(inner) for key, inner in value.items()}
        return tuple(map(convert, value)) if isinstance(value, list) else value

    return ConfigDict(convert(tree)).lock()


_LOSS_CHOICES = {"reduction": ("sum", "mean"), "word_weights": ("attention", "uniform"),
                 "patch_weights": ("attention", "uniform"), "codes": ("global", "local"),
                 "aggregate": ("sum", "mean")}
_LOSS_NATURAL = ("weight", "contrast", "contrast_reconstructed", "reconstruction", "iterations")
_WORD_CHOICES = {"attention_of": ("own", "next"), "truncated": ("keep", "drop")}


def _optim_problems(optim: Mapping[str, Any]) -> list[str]:
    """What is wrong with section `optim`, beyond types."""
    problems = []
    if len(optim.betas) != 2 or not all(
            isinstance(beta, (int, float)) and 0 <= beta < 1 for beta in optim.betas):
        problems.append(f"optim.betas={optim.betas} must be two numbers in [0, 1)")
    if not optim.learning_rate > 0:
        problems.append(f"optim.learning_rate={optim.learning_rate} must be positive")
    if not 0 <= optim.floor <= max(optim.learning_rate, 0):
        problems.append(f"optim.floor={optim.floor} must be between 0 and optim.learning_rate="
                        f"{optim.learning_rate}")
    if not 0 < optim.plateau_factor < 1:
        problems.append(f"optim.plateau_factor={optim.plateau_factor} must be in (0, 1)")
    for key, what, check in (
            ("groups", "(regex, factor)", lambda factor: float(factor) >= 0),
            ("start", "(regex, duration)", lambda length: steps_of(
                length, total=1, per_epoch=1) >= 0)):
        for entry in optim[key]:
            try:
                pattern, value = entry if isinstance(entry, (tuple, list)) else (entry,)
                re.compile(pattern)
                if not check(value):
                    raise ValueError(f"{value} is negative")
            except (TypeError, ValueError, UserError, re.error) as error:
                problems.append(f"optim.{key} has {entry!r} ({error}); each entry is {what}, as in "
                                f"optim.{key}=(('params/text/.*', "
                                f"{0.1 if key == 'groups' else repr('1epochs')}),)")
    for pattern in optim.freeze:
        try:
            re.compile(pattern)
        except (TypeError, re.error) as error:
            problems.append(f"optim.freeze has {pattern!r} ({error}); each entry is a regex, as in "
                            "optim.freeze=('params/text/.*',)")
    return problems


def _are_numbers(values: Any, count: int, kind: type | tuple[type, ...] = (int, float)) -> bool:
    """Whether these are so many finite numbers."""
    return (isinstance(values, (tuple, list)) and len(values) == count
            and all(isinstance(v, kind) and math.isfinite(v) for v in values))


def _stem_problems(stem: Sequence[Any], patch: Sequence[int]) -> list[str]:
    """What is wrong with `model.vision.stem`, whose stages part the patch."""
    left = tuple(patch)
    for stage in stem:
        if not (isinstance(stage, (tuple, list)) and len(stage) == 2
                and _are_numbers(stage[0], len(patch), int) and _are_numbers(stage[1:], 1, int)
                and min(*stage[0], stage[1]) > 0):
            return [f"model.vision.stem has {stage!r}; each stage is (size, features), as in "
                    f"model.vision.stem=(({(2,) * len(patch)}, 32),)"]
        if any(rest % size for rest, size in zip(left, stage[0], strict=True)):
            return [f"model.vision.stem has stages of {stage[0]} cells, which do not divide "
                    f"{left}, what is left of model.vision.patch={tuple(patch)}"]
        left = tuple(rest // size for rest, size in zip(left, stage[0], strict=True))
    return []


# A trace of more steps than this takes too much memory, and nobody reads it.
LONGEST_PROFILE = 100


def _profile_problems(window: Any) -> list[str]:
    """What is wrong with `train.profile`."""
    if len(window) == 0 or (_are_numbers(window, 2, int)
                            and 1 <= window[0] <= window[1] < window[0] + LONGEST_PROFILE):
        return []
    return [f"train.profile={window} must be the first and the last of at most {LONGEST_PROFILE} "
            "steps, as in train.profile=(20, 24), or ()"]


def _classifier_problems(config: ConfigDict) -> list[str]:
    """What is wrong with a classifier's classes, labels and weights."""
    classes, share = config.model.get("classes"), config.data.get("label_fraction", 1.0)
    weights = config.losses.get("classification", {}).get("positive_weights", ())
    problems = []
    if classifies(config) and (classes is None or "label_fraction" not in config.data):
        problems.append("losses.classification needs model.classes and data.label_fraction; start "
                        "from the recipe finetune")
    names = classes or ()
    if not all(isinstance(name, str) and name for name in names) or len({*names}) < len(names):
        problems.append(f"model.classes={names} must be different names of findings")
    if not 0 < share <= 1:
        problems.append(f"data.label_fraction={share} must be a share above 0 and at most 1")
    if weights not in ((), (PREVALENCE,)) and not (
            _are_numbers(weights, len(names)) and min(weights) > 0):
        problems.append(f"losses.classification.positive_weights={weights} must be (), "
                        f"({PREVALENCE!r},), or a positive number for each of model.classes")
    return problems


def validate(config: ConfigDict) -> ConfigDict:
    """Checks what no type can: sizes that must divide, shares that must be positive.

    Returns:
        The same configuration.

    Raises:
        UserError: one message that lists every problem.
    """
    problems = []

    def expect(good: bool, message: str) -> None:
        if not good:
            problems.append(message)

    missing = [name for name in ("model", "data", "losses", "optim", "train", "mesh")
               if name not in config]
    if missing:
        raise UserError(f"the configuration has no section {', '.join(missing)}; start from one of "
                        f"the recipes {', '.join(recipes())}")
    leaves = flatten(config)
    positive = ["model.embed_dim", "model.text.max_tokens", "model.text.positions",
                "train.log_every", "train.checkpoint_every", "model.input.std", "model.bank.scale",
                "model.head.hidden", "model.local_head.hidden",
                *(key for tower in ("vision", "text") for part in (
                    "width", "depth", "heads", "mlp_width")
                  if (key := f"model.{tower}.{part}") in leaves)]
    natural = ("seed", "model.bank.rows", "data.sentences", "data.threads", "train.eval_every",
               "optim.clip", "optim.weight_decay", "model.prototypes", "model.logit.scale",
               "model.cross_attention_heads", "train.microbatch")
    for key in positive:
        expect(isinstance(leaves[key], str) or leaves[key] > 0,
               f"{key}={leaves[key]} must be positive")
    for key in natural:
        expect(isinstance(leaves[key], str) or leaves[key] >= 0,
               f"{key}={leaves[key]} must not be negative")
    expect(config.seed < 2**32, f"seed={config.seed} must be below 2**32")
    expect(0 <= config.optim.ema < 1, f"optim.ema={config.optim.ema} must be in [0, 1)")
    rank = len(config.model.input.shape)
    expect(rank in (2, 3), f"model.input.shape={config.model.input.shape} must be three numbers of "
           "voxels, or two of pixels")
    grids = ["model.input.shape", "data.crop", *["model.input.spacing"] * (rank == 3)]
    if "patch" in config.model.vision:
        grids.append("model.vision.patch")
    for key in grids:
        kind = (int, float) if key == "model.input.spacing" else int
        expect(_are_numbers(leaves[key], rank, kind) and min(leaves[key]) > 0,
               f"{key}={leaves[key]} must be {'two' if rank == 2 else 'three'} positive "
               f"{'whole ' if kind is int else ''}numbers")
    for key, choices in (("train.parallel", ("mesh", "pmap")),
                         ("model.batch_statistics", ("global", "local"))):
        expect(leaves[key] in choices, miss(key, leaves[key], choices))
    problems += _optim_problems(config.optim) + _profile_problems(config.train.profile)
    problems += _classifier_problems(config)
    for key, least in (("model.text.max_tokens", 2), ("model.text.last_n_layers", 1),
                       ("model.text.token_types", 0), ("model.text.divisor", 0),
                       ("train.keep_checkpoints", 1)):
        expect(leaves[key] >= least, f"{key}={leaves[key]} must be at least {least}")
    volumes = config.train.get("eval_volumes", 0)
    expect(volumes >= 0 and (not volumes or config.train.eval_every),
           f"train.eval_volumes={volumes} must be a number of volumes that are read at every "
           "validation, which train.eval_every sets; or 0")
    expect(config.model.dtype in ("float32", "bfloat16"),
           miss("model.dtype", config.model.dtype, ("float32", "bfloat16")))
    expect(config.data.captions in CAPTIONS, miss("data.captions", config.data.captions, CAPTIONS))
    for key, open_end in (("data.drop", True), ("data.report_share", False)):
        expect(0 <= leaves[key] < 1 or leaves[key] == 1 and not open_end,
               f"{key}={leaves[key]} must be a share {'below' if open_end else 'of at most'} 1")
    window = config.model.input.window
    pairs = window if window and isinstance(window[0], tuple) else (window,)
    for pair in pairs:
        expect(_are_numbers(pair, 2) and pair[0] < pair[1],
               f"model.input.window has {pair!r}; a window is (low, high) in HU")
    if problems:
        raise UserError("the configuration does not fit together: " + "; ".join(problems))
    expect(config.model.text.max_tokens <= config.model.text.positions,
           f"model.text.max_tokens={config.model.text.max_tokens} exceeds model.text.positions="
           f"{config.model.text.positions}")
    vision, text, train = config.model.vision, config.model.text, config.train
    for name, tower in (("vision", vision), ("text", text)):
        if "heads" in tower:
            expect(tower.width % tower.heads == 0,
                   f"model.{name}.width={tower.width} is not a multiple of "
                   f"model.{name}.heads={tower.heads}")
    for key in ("data.crop", "model.input.shape") if "patch" in vision else ():
        expect(all(s % p == 0 for s, p in zip(leaves[key], vision.patch, strict=True)),
               f"{key}={tuple(leaves[key])} is not a multiple of model.vision.patch="
               f"{tuple(vision.patch)}")
    problems += _stem_problems(vision.get("stem", ()), vision.get("patch", ()))
    expect(all(c <= s for c, s in zip(config.data.crop, config.model.input.shape, strict=True)),
           f"data.crop={tuple(config.data.crop)} exceeds model.input.shape="
           f"{tuple(config.model.input.shape)}")
    expect(isinstance(train.steps, str) or train.steps > 0,
           f"train.steps={train.steps} must be positive")
    expect(config.data.batch_size > 1,
           f"data.batch_size={config.data.batch_size} must be at least 2: contrast needs negatives")
    for name, term in config.losses.items():
        temperature, scale = term.get("temperature", 1.0), config.model.logit.scale
        learned = name in ("info_nce", "knowledge_interaction")
        expect(temperature > 0 or (learned and temperature == 0 and scale > 0),
               f"losses.{name}.temperature={temperature} must be positive"
               + (", or 0 with a learned scale that starts at model.logit.scale" if learned
                  else ""))
        for group in term.get("positives", ()):
            expect(group in GROUPS, miss(f"losses.{name}.positives", str(group), GROUPS))
        negatives = term.get("negatives", "global")
        expect(negatives in NEGATIVES, miss(f"losses.{name}.negatives", negatives, NEGATIVES))
    for key, value in leaves.items():
        section, _, last = key.rpartition(".")
        in_losses = section.startswith("losses.")
        choices = (_LOSS_CHOICES if in_losses else
                   _WORD_CHOICES if section == "model.words" else {}).get(last)
        expect(not choices or value in choices, miss(key, str(value), choices or ()))
        expect(not in_losses or last not in _LOSS_NATURAL or value >= 0,
               f"{key}={value} must not be negative")
        expect(not in_losses or last != "epsilon" or value > 0, f"{key}={value} must be positive")
    for name, term in config.losses.items():
        expect("low" not in term or 0 <= term.low <= term.high <= 1,
               f"losses.{name}.low={term.get('low')} and high={term.get('high')} must be quantiles "
               "0 <= low <= high <= 1")
    expect(any(term.weight > 0 for term in config.losses.values()),
           "every entry of losses has weight 0; give at least one a positive weight")
    for name, met, need in (
            ("knowledge_interaction", config.model.bank.rows > 0, "a bank; set model.bank.rows"),
            ("token_alignment", config.model.local_head.name,
             "projected tokens; set model.local_head.name=batchnorm"),
            ("local_alignment", config.model.local_head.name,
             "projected tokens; set model.local_head.name=batchnorm"),
            ("prototype_alignment", config.model.prototypes > 0,
             "prototypes; set model.prototypes"),
            ("sigmoid", config.model.logit.scale > 0,
             "a learned scale and bias; set model.logit.scale")):
        used = name in config.losses and config.losses[name].weight > 0
        expect(met or not used, f"losses.{name} needs {need}")
    heads = config.model.cross_attention_heads
    expect(not heads or config.model.embed_dim % heads == 0,
           f"model.cross_attention_heads={heads} does not divide "
           f"model.embed_dim={config.model.embed_dim}")
    expect(text.last_n_layers <= text.depth + 1,
           f"model.text.last_n_layers={text.last_n_layers} exceeds the "
           f"{text.depth + 1} hidden states of model.text.depth={text.depth}")
    if problems:
        raise UserError("the configuration does not fit together: " + "; ".join(problems))
    return config
