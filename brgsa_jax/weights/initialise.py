"""Weights to start from: parts of other models fitted to a new one.

What can be carried over exactly is; position tables are resized, 2-D weights inflated to 3-D,
surplus layers left out; every parameter's fate goes into a table, and sizes that do not fit are
one error that names the keys to change.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from brgsa_jax import paths
from brgsa_jax.config import UserError
from brgsa_jax.nn.vit import resize_positions
from brgsa_jax.weights import hub
from brgsa_jax.weights.bert import read_text
from brgsa_jax.weights.checkpoints import import_checkpoint
from brgsa_jax.weights.mapping import listing
from brgsa_jax.weights.native import FORMAT, load_native
from brgsa_jax.weights.reference import base_grid
from brgsa_jax.weights.vision import read_vision

INFLATIONS = ("mean", "centre")
RANDOM, EXACT = "at random", "loaded"


class Fate(NamedTuple):
    """What became of one parameter.

    Attributes:
        path: below "params", "stats" or "bank".
        count: its numbers.
        how: "loaded", "at random", or what was done to make it fit.
        source: where it came from, "" for one at random.
    """

    path: str
    count: int
    how: str
    source: str


class Part(NamedTuple):
    """Weights of one tower, in the geometry they were trained in.

    Attributes:
        arrays: by path below the part, "params/…" and "stats/…".
        sizes: what is known of: kind, patch, channels, grid, stages, block, heads.
        source: for messages.
    """

    arrays: dict[str, np.ndarray]
    sizes: dict[str, Any]
    source: str


def initial_weights(config: Any, expected: Any) -> tuple[dict[str, np.ndarray], list[Fate]]:
    """Reads the weights that a `model` section says to start from.

    `model.init_from` is a whole model (native folder, work directory, or a checkpoint of BrgSA or
    MGCA); `model.vision.init_from` and `model.text.init_from` are towers and win over it.

    Args:
        config: section `model`.
        expected: {"params", "stats", "bank"} of shapes.

    Returns:
        Arrays by path, those that stay at random left out, and the fate of every parameter.

    Raises:
        UserError: nothing readable there, or sizes that do not fit.
    """
    leaves = {path: tuple(leaf.shape) for path, leaf in paths.flat(expected).items()}
    found: dict[str, tuple[np.ndarray, str, str]] = {}
    if config.init_from:
        found |= _whole(config, leaves)
    if config.vision.init_from:
        part = _foreign_vision(config.vision.init_from)
        found |= fit_vision(part, config, leaves, "model.vision.init_from")
    if config.text.init_from:
        found |= fit_text(_foreign_text(config.text.init_from), config, leaves,
                          "model.text.init_from")
    arrays = {path: value for path, (value, _, _) in found.items()}
    fates = [Fate(path, int(np.prod(shape)), *found.get(path, (None, RANDOM, ""))[1:])
             for path, shape in leaves.items()]
    return arrays, fates


def summary(fates: list[Fate]) -> list[tuple[str, str, str, str]]:
    """Rows (part, numbers, what was done, source) of a table, equal fates of a part together."""
    rows: dict[tuple[str, str, str], int] = {}
    for fate in fates:
        names = fate.path.split("/")
        part = names[0] if names[0] != "params" else names[1]
        if names[0] == "stats":
            part = f"{names[1]} statistics"
        key = (part, fate.how if fate.how in (RANDOM, EXACT) else
               f"{'/'.join(names[2:])} {fate.how}", fate.source)
        rows[key] = rows.get(key, 0) + fate.count
    return [(part, f"{count:,}", how, source) for (part, how, source), count in rows.items()]


def native_folder(place: str | Path) -> Path | None:
    """The folder of a native model or finished run at this place, None if there is none."""
    for folder in (Path(place) / "model", Path(place)):
        config = folder / "config.json"
        if os.path.isfile(config) and hub.read_json(config, "give another place").get(
                "format") == FORMAT:
            return folder
    return None


def _whole(config: Any, leaves: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Everything a whole model has to give."""
    place = config.init_from
    folder = native_folder(place)
    if folder is None and not os.path.isfile(place):
        folder = hub.locate(place, "a folder of a model, a work directory that has finished, or a "
                            "checkpoint of BrgSA or MGCA")
    model = load_native(folder) if folder else import_checkpoint(place)
    tree = {"params": model.params, "stats": model.stats,
            **({} if model.bank is None else {"bank": model.bank})}
    arrays = {path: np.asarray(x) for path, x in paths.flat(tree).items()}
    same_classes = tuple(model.config.get("classes", ())) == tuple(config.get("classes", ()))
    found = {path: (x, EXACT, str(place)) for path, x in arrays.items()
             if leaves.get(path) == x.shape
             and path.split("/")[1:2] not in (["vision"], ["text"])
             and (same_classes or path.split("/")[1:2] != ["classifier"])}
    if model.config.vision.name == config.vision.name or {
            model.config.vision.name, config.vision.name} == {"vit2d", "vit3d"}:
        found |= fit_vision(_native_part(model, "vision", place), config, leaves,
                            "model.init_from")
    return found | fit_text(_native_part(model, "text", place), config, leaves, "model.init_from")


def _native_part(model: Any, name: str, place: str | Path) -> Part:
    arrays = {}
    for root, tree in (("params", model.params), ("stats", model.stats)):
        for path, x in paths.flat(tree.get(name, {})).items():
            arrays[f"{root}/{path}"] = np.asarray(x)
    section = model.config[name]
    sizes: dict[str, Any] = {key: section.get(key)
                             for key in ("heads", "norm_epsilon", "position_ids")}
    if name == "vision" and "patch" in section:
        sizes |= {"kind": "vit", "patch": tuple(section.patch), "grid": base_grid(model.config),
                  "channels": _channels(model.config), "stem": section.get("stem", ())}
    elif name == "vision":
        sizes |= {"kind": "resnet", "channels": _channels(model.config)}
    return Part(arrays, sizes, str(place))


def _channels(config: Any) -> int:
    """Channels of the images a model takes: three of a radiograph, one a window of a volume."""
    if len(config.input.shape) == 2:
        return 3
    window = config.input.window
    return len(window) if isinstance(window[0], (tuple, list)) else 1


def _foreign_vision(place: str) -> Part:
    """A vision tower by itself."""
    folder = native_folder(place)
    if folder:
        return _native_part(load_native(folder), "vision", place)
    weights = read_vision(place)
    return Part(_flat_part(weights), {"kind": weights.kind, **weights.sizes}, place)


def _foreign_text(place: str) -> Part:
    """A text tower by itself."""
    folder = native_folder(place)
    if folder:
        return _native_part(load_native(folder), "text", place)
    weights = read_text(place)
    return Part({f"params/{path}": x for path, x in paths.flat(weights.params).items()},
                dict(weights.sizes), place)


def _flat_part(weights: Any) -> dict[str, np.ndarray]:
    return {f"{root}/{path}": x for root, tree in (("params", weights.params),
                                                   ("stats", weights.stats))
            for path, x in paths.flat(tree).items()}


def fit_text(part: Part, config: Any, leaves: Mapping[str, tuple[int, ...]],
             key: str) -> dict[str, Any]:
    """Fits a text tower: fewer layers and positions than it has may be taken.

    Raises:
        UserError: sizes that do not fit.
    """
    text = config.text
    if text.vocab and part.arrays["params/word/embedding"].shape[0] != text.vocab:
        raise UserError(f"{key}={part.source} has a table of "
                        f"{part.arrays['params/word/embedding'].shape[0]} tokens and the tokenizer "
                        f"knows {text.vocab}; set model.text.tokenizer to the tokenizer these "
                        "weights were trained with")
    # What is in no shape and would silently compute something else.
    for name in ("norm_epsilon", "position_ids"):
        theirs = part.sizes.get(name)
        if theirs is not None and theirs != text[name]:
            raise UserError(f"{key}={part.source} was trained with {name}={theirs} and model.text."
                            f"{name} is {text[name]}; set model.text.{name}={theirs}")
    return _fit(part, "text", {"width": text.width, "heads": text.heads, "depth": text.depth,
                               "mlp_width": text.mlp_width, "positions": text.positions},
                leaves, key, {})


def fit_vision(part: Part, config: Any, leaves: Mapping[str, tuple[int, ...]],
               key: str) -> dict[str, Any]:
    """Fits a vision tower: position tables are resized, 2-D weights inflated.

    Raises:
        UserError: another kind of tower, or sizes that do not fit.
    """
    vision = config.vision
    kind = "vit" if "patch" in vision else "resnet"
    if part.sizes["kind"] != kind:
        raise UserError(f"{key}={part.source} is a {part.sizes['kind']} and model.vision.name="
                        f"{vision.name} is a {kind}; choose a tower of the same kind")
    if vision.inflate not in INFLATIONS:
        raise UserError(f"model.vision.inflate={vision.inflate!r} must be one of "
                        f"{', '.join(INFLATIONS)}")
    made: dict[str, tuple[np.ndarray, str]] = {}
    rank = len(config.input.shape)
    if kind == "resnet":
        for path, x in part.arrays.items():
            shape = leaves.get(_place(path, "vision"))
            if path.endswith("conv/kernel") and shape is not None and x.shape != shape:
                made[path] = inflate(x, x.shape[:-2], shape[:rank], shape[-2], vision.inflate)
        return _fit(part, "vision", {}, leaves, key, made)
    grid, target = part.sizes["grid"], base_grid(config)
    table = part.arrays["params/positions"]
    if tuple(grid) != tuple(target):
        made["params/positions"] = resize_table(table, grid, target)
    patch, channels = tuple(part.sizes["patch"]), _channels(config)
    kernel = part.arrays["params/patch_embed/kernel"]
    same_stem = tuple(vision.get("stem", ())) == tuple(part.sizes.get("stem", ()))
    if not same_stem:
        names = ("params/patch_embed/", "params/stem_")
        part = part._replace(arrays={path: x for path, x in part.arrays.items()
                                     if not path.startswith(names)})
    elif patch != tuple(vision.patch) or channels != part.sizes["channels"]:
        shaped = kernel.reshape(*patch, part.sizes["channels"], -1)
        new, how = inflate(shaped, patch, tuple(vision.patch), channels, vision.inflate)
        made["params/patch_embed/kernel"] = new.reshape(-1, new.shape[-1]), how
    return _fit(part, "vision", {"width": vision.width, "heads": vision.heads,
                                 "depth": vision.depth, "mlp_width": vision.mlp_width},
                leaves, key, made)


def _place(path: str, name: str) -> str:
    root, _, rest = path.partition("/")
    return f"{root}/{name}/{rest}"


def _fit(part: Part, name: str, wanted: Mapping[str, int], leaves: Mapping[str, tuple[int, ...]],
         key: str, made: Mapping[str, tuple[np.ndarray, str]]) -> dict[str, Any]:
    """Pairs arrays with leaves; whatever else than layers and positions differs is a problem."""
    found, problems = {}, []
    heads = part.sizes.get("heads")
    if heads and wanted and heads != wanted["heads"]:
        problems.append(f"it has {heads} heads, model.{name}.heads={wanted['heads']}")
    for path, x in part.arrays.items():
        place = _place(path, name)
        shape, how = leaves.get(place), EXACT
        if path in made:
            x, how = made[path]
        if shape is None:
            continue
        stacked = "/layers/blocks/" in path
        rows = stacked or path == "params/position/embedding"
        if rows and x.shape[1:] == shape[1:] and len(x) > shape[0]:
            what = "layers" if stacked else "rows"
            x, how = x[:shape[0]], f"first {shape[0]} of {len(x)} {what}"
        if x.shape != shape:
            problems.append(f"{place} has the shape {list(x.shape)} there and {list(shape)} here")
        found[place] = (np.asarray(x, np.float32), how, part.source)
    missing = [path for path in leaves
               if path.split("/")[:2] in (["params", name], ["stats", name]) and path not in found]
    unfit = [path for path in missing if "/layers/" in path or path.endswith("/embedding")]
    problems += [f"{path} is not there" for path in unfit]
    if problems:
        theirs = [f"model.{name}.{size}={value}" for size, value in _sizes(part).items()
                  if size in wanted and value != wanted[size]
                  and not (size in ("depth", "positions") and value > wanted[size])]
        raise UserError(f"{key}={part.source} does not fit the model: {listing(problems)}; set "
                        f"{', '.join(theirs)}, or choose others" if theirs else
                        f"{key}={part.source} does not fit the model: {listing(problems)}; choose "
                        "weights of the same structure")
    return found


def _sizes(part: Part) -> dict[str, int]:
    """Sizes of a transformer, as its arrays and what came with it tell."""
    found = {}
    up = part.arrays.get("params/layers/blocks/up/kernel")
    if up is not None:
        found = dict(zip(("depth", "width", "mlp_width"), up.shape, strict=True))
    if "params/position/embedding" in part.arrays:
        found["positions"] = len(part.arrays["params/position/embedding"])
    return found | ({"heads": part.sizes["heads"]} if part.sizes.get("heads") else {})


def resize_table(table: np.ndarray, grid: tuple[int, ...],
                 target: tuple[int, ...]) -> tuple[np.ndarray, str]:
    """Fits a position table [1 + N, W], CLS first, to another grid.

    A 2-D table (rows, columns) becomes one of volumes (X, Y, Z) as an axial slice is looked at:
    columns are X, rows Y, and every slice has the same.

    Returns:
        [1 + ∏target, W], and what was done.
    """
    places = table[1:]
    how = f"resized from {'×'.join(map(str, grid))} to {'×'.join(map(str, target))}"
    if len(grid) == 2 and len(target) == 3:
        places = places.reshape(*grid, -1).swapaxes(0, 1).reshape(len(places), -1)
        flat = np.asarray(resize_positions(jnp.asarray(places), grid[::-1], target[:2]))
        places = flat.reshape(-1, 1, flat.shape[-1]).repeat(target[2], 1)
        places = places.reshape(-1, places.shape[-1])
    elif len(grid) == len(target):
        places = np.asarray(resize_positions(jnp.asarray(places), grid, target))
    else:
        raise UserError(f"positions of {len(grid)} axes cannot become positions of "
                        f"{len(target)}; start a radiograph model from 2-D weights")
    return np.concatenate([table[:1], places]), how


def inflate(kernel: np.ndarray, size: tuple[int, ...], target: tuple[int, ...], channels: int,
            how: str) -> tuple[np.ndarray, str]:
    """Fits a kernel [*size, C, out] to another size, channels, or from 2-D to 3-D.

    An input that is constant along the new axis, and the same in all channels, gives what it gave
    before: Carreira and Zisserman 2017. Rows and columns of a 2-D kernel become Y and X.

    Args:
        kernel: [*size, C, out].
        size: of its window.
        target: wanted size of the window, of as many axes or one more.
        channels: wanted channels.
        how: "mean" spreads a 2-D kernel evenly over the depth, "centre" puts it into the middle.

    Returns:
        [*target, channels, out], and what was done.

    Raises:
        UserError: a 3-D kernel for 2-D images.
    """
    steps = []
    if kernel.shape[-2] != channels:
        steps.append(f"{kernel.shape[-2]} to {channels} channels")
        kernel = kernel.sum(-2, keepdims=True).repeat(channels, -2) / channels
    if len(size) == 2 and len(target) == 3:
        steps.append(f"inflated to 3-D ({how})")
        kernel, size = kernel.swapaxes(0, 1), size[::-1]
    if len(size) > len(target):
        raise UserError("3-D kernels cannot become 2-D; start a radiograph model from 2-D weights")
    flat = target[:len(size)]
    if tuple(size) != flat:
        steps.append(f"window {'×'.join(map(str, size))} resized to {'×'.join(map(str, flat))}")
        wide = jax.image.resize(kernel, (*flat, *kernel.shape[-2:]), "linear")
        kernel = np.asarray(wide) * (np.prod(size) / np.prod(flat))
    if len(target) > len(size):
        depth = target[-1]
        share = np.zeros(depth, np.float32)
        if how == "mean":
            share[:] = 1.0 / depth
        else:
            # An even depth has two middle slices.
            share[(depth - 1) // 2] += 0.5
            share[depth // 2] += 0.5
        kernel = kernel[:, :, None] * share[:, None, None]
    return kernel, ", ".join(steps)
