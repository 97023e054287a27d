"""Heat-maps: which part of an image speaks for a prompt.

"cam" asks by gradients what of the image the score came from: gradient × activation, summed over
channels and cut at 0 (HiResCAM, Draelos and Carin 2020), of the cells a ViT's patches are embedded
from, the finest there are, or of a ResNet's last stage, where it equals Grad-CAM (Selvaraju et al.
2017) since a mean is pooled. "rollout" asks what the attention of a ViT passed on:
gradient-weighted attention rollout (`nn.rollout`); a ResNet has none, so it gets "cam".
"similarity" asks what each place looks like by itself: its own projected vector is scored against
the prompt. "auto" is "cam" for a ResNet and for a ViT with a convolutional stem, whose patches are
coarse, else "rollout".

A map says what this score hangs on. It is no segmentation, and no evidence that the finding is
there: a prompt of an absent finding has a map too.
"""

import functools
import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from brgsa_jax.config import UserError, from_tree
from brgsa_jax.data.placement import Placement, to_source
from brgsa_jax.data.tokenizer import clean_report
from brgsa_jax.evals.scores import SCORE_MODES, unit, write_atomic
from brgsa_jax.evals.volume_picture import radiograph_picture, volume_picture
from brgsa_jax.losses.knowledge import read_bank
from brgsa_jax.model import Model
from brgsa_jax.network import build
from brgsa_jax.nn.rollout import Inside, Taps, look_inside, rollout
from brgsa_jax.nn.words import gather_words
from brgsa_jax.registry import miss

METHODS = ("auto", "cam", "rollout", "similarity")


class Directions(NamedTuple):
    """Scores as linear functions of unit vectors: S_p = v/|v|·direct_p + v̂/|v̂|·bridged_p.

    Every score of `scores.SCORE_MODES` has this form, as have means and differences of them, and
    with them ensembles of prompts and pairs of a prompt and its negation.

    Attributes:
        direct: [P, D] float32.
        bridged: [P, D] float32; zero where v̂ has no part.
    """

    direct: np.ndarray
    bridged: np.ndarray


def directions(model: Model, prompts: Sequence[str], *, score: str = "mean",
               method: str = "auto",
               encode: Callable[[Sequence[str]], np.ndarray] | None = None) -> Directions:
    """Encodes prompts to what their scores are linear in.

    Args:
        model: whose text tower is used.
        prompts: P texts.
        score: one of `scores.SCORE_MODES`; a model without a bank has only "direct", which then
            also stands for "mean".
        method: "similarity" of a model with heads for patches and words (MGCA) compares in their
            space: the direction is the mean of the prompt's unit word vectors, and `score` has no
            say.
        encode: texts to embeddings [P, D]; None is the model's `encode_text`.

    Raises:
        UserError: no prompt, an unknown score or method, or one that needs a bank.
    """
    for what, value, choices in (("score", score, SCORE_MODES), ("method", method, METHODS)):
        if value not in choices:
            raise UserError(miss(what, value, choices))
    if not prompts:
        raise UserError("there is no prompt to draw a heat-map for; give at least one such as "
                        "'There is Lung nodule'")
    if _is_local(model.network, method):
        words = _word_directions(model, prompts)
        return Directions(words, np.zeros_like(words))
    text = (encode or model.encode_text)(prompts)
    if model.bank is None:
        if score not in ("direct", "mean"):
            raise UserError(f"the score {score!r} is not available here; choices: direct")
        score = "direct"
    elif score in ("bridged", "text_bridged"):
        text = np.asarray(read_bank(text, model.bank,
                                    scale=model.config.bank.scale).reconstruction)
    text = unit(text).astype(np.float32)
    share = {"direct": (1, 0), "text_bridged": (1, 0), "mean": (0.5, 0.5)}.get(score, (0, 1))
    return Directions(share[0] * text, share[1] * text)


def _is_local(network: Any, method: str) -> bool:
    return method == "similarity" and network.has_tokens


def _word_directions(model: Model, prompts: Sequence[str]) -> np.ndarray:
    """Mean over the words of their unit vectors from the local head, [P, D]."""
    network, stats = model.network, model.stats
    if model.config.text.get("clean", False):
        prompts = [" ".join(clean_report(prompt)) for prompt in prompts]
    ids, mask = model.tokenizer(list(prompts))
    text = network.text.apply(model.params["text"], ids, mask, stats=stats.get("text"))
    words = gather_words(text.tokens, text.attention, model.tokenizer.words(ids), **network.words)
    vectors = network.parts["text_local_head"].apply(
        model.params["text_local_head"], words.embeddings, ~words.pad_mask,
        stats=stats.get("text_local_head"))
    there = ~np.asarray(words.pad_mask)[..., None]
    return ((unit(np.asarray(vectors)) * there).sum(1) / there.sum(1)).astype(np.float32)


def heatmaps(model: Model, volumes: Any, prompts: Sequence[str], *, method: str = "auto",
             score: str = "mean") -> np.ndarray:
    """Draws a map of every volume for every prompt, on the model's input grid.

    Args:
        model: from `load_model`.
        volumes: HU volumes [N, X, Y, Z] in the canonical LPS frame, or radiographs [N, H, W].
        prompts: P texts such as "There is Lung nodule".
        method: one of `METHODS`, see the module. Similarity is trained for in models
            with heads for patches and words, and a ViT that pools its patches scores each as if
            it were pooled alone. Patches of a ViT pooled by its class token were never compared
            with a text: their vectors share the last layer's space with that token's, no more.
        score: the score that is explained, see `directions`.

    Returns:
        float32 [N, P, *shape], ≥ 0. Maps of one volume may be compared with each other by place,
        not by height.

    Raises:
        UserError: as `directions`, or volumes of another shape than the model's.
    """
    draw = mapper(model, directions(model, prompts, score=score, method=method), method)
    return np.stack([draw(volume) for volume in volumes])


def mapper(model: Model, wanted: Directions,
           method: str = "auto") -> Callable[[np.ndarray], np.ndarray]:
    """Returns what maps one image [*shape] to its maps float32 [P, *shape], ≥ 0.

    One image and one prompt at a time are in memory beside the results.

    Args:
        model: from `load_model`.
        wanted: of P prompts.
        method: see `heatmaps`.
    """
    if method == "auto":
        method = automatic(model)
    program = _program(json.dumps(model.config.to_dict(), sort_keys=True), method)
    bank = model.bank
    wanted = Directions(*map(jnp.asarray, wanted))

    def draw(image: np.ndarray) -> np.ndarray:
        image = np.asarray(image)
        if image.shape != model.shape:
            raise UserError(f"an image of shape {image.shape} is none of this model, which reads "
                            f"{model.shape}; read files with data.recipe.load_image")
        try:
            return np.asarray(program(model.params, model.stats, bank, image, wanted))
        except ValueError as error:
            raise UserError(f"no heat-map can be drawn: {error}") from error

    return draw


def overlay(image: np.ndarray, heat: np.ndarray, spacing: Sequence[float] = (), title: str = "",
            **options: Any) -> bytes:
    """Draws a map over its image: three planes of a volume through the highest voxel.

    Args:
        image: HU [X, Y, Z] in LPS, or grey levels uint8 [H, W].
        heat: the map, ≥ 0, of the same shape.
        spacing: mm for x, y, z of a volume.
        title: a line above a volume's planes.
        **options: further ones of `volume_picture`.

    Returns:
        A PNG file as bytes.
    """
    if np.ndim(image) == 2:
        return radiograph_picture(image, heat)
    highest = np.argwhere(heat == np.max(heat))
    # Of a flat top the middle.
    at = highest[np.linalg.norm(highest - highest.mean(axis=0), axis=1).argmin()]
    return volume_picture(image, spacing, title, at=at, heat=heat, **options)


def write_map(path: str | Path, heat: np.ndarray, placement: Placement) -> Path:
    """Writes a map on the grid of the file its volume was read from, as NIfTI with its affine.

    The values are stored in 32767 steps of the highest one. Of a DICOM series with uneven gaps
    every slice holds what lies there, while the affine gives the mean distance.

    Args:
        path: a name that ends in .nii.gz.
        heat: [X, Y, Z] ≥ 0 on the model's grid.
        placement: of the volume, see `data.placement`.
    """
    import nibabel

    values = to_source(heat, placement)
    step = float(values.max()) / 32767 or 1.0
    image = nibabel.Nifti1Image(np.rint(values / step).astype(np.int16), placement.affine)
    image.header.set_slope_inter(step, 0.0)
    image.header.set_xyzt_units("mm")
    write_atomic(path, gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))
    return Path(path)


@functools.lru_cache(maxsize=4)
def _program(config: str, method: str) -> Callable[..., jax.Array]:
    """Jitted (params, stats, bank, image, Directions) -> maps [P, *shape]; models share it."""
    section = from_tree(json.loads(config))
    network = build(section)
    head = "vision_local_head" if _is_local(network, method) else "vision_head"

    def run(params: Any, stats: Any, bank: Any, image: jax.Array, wanted: Directions) -> jax.Array:
        def embed(rows: jax.Array) -> jax.Array:
            return network.parts[head].apply(params[head], rows, stats=stats.get(head))

        def score(rows: jax.Array) -> jax.Array:
            """[n, W] -> [n, P]."""
            v = embed(rows)
            scores = _unit(v) @ wanted.direct.T
            if bank is not None and head == "vision_head":
                read = read_bank(v, bank, scale=section.bank.scale).reconstruction
                scores = scores + _unit(read) @ wanted.bridged.T
            return scores

        def tower(taps: Taps | None) -> tuple[jax.Array, Inside]:
            output, inside = look_inside(lambda: network.vision.apply(
                params["vision"], network.normalize(image[None]), stats=stats.get("vision")), taps)
            return output.pooled, inside

        if method != "similarity":
            maps = _by_gradients(section, method, tower, score)
        else:
            places = (_local_places if head == "vision_local_head" else _pooled_places)(
                section.vision, tower)
            scores = score(places.reshape(-1, places.shape[-1])).T
            maps = (scores - scores.min(axis=1, keepdims=True)).reshape(-1, *places.shape[:-1])
        maps = maps.reshape(-1, *_grid(section, maps.shape[1:])).astype(jnp.float32)
        return jax.image.resize(maps, (len(maps), *image.shape), "linear", antialias=False)

    return jax.jit(run)


def _unit(x: jax.Array) -> jax.Array:
    norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x / jnp.where(norm > 0, norm, 1.0)


def _grid(section: Any, places: Sequence[int]) -> tuple[int, ...]:
    """Grid of a tower's places: a ViT's lie in a row, a ResNet's stage has its own axes."""
    if len(places) > 1:
        return tuple(places)
    return tuple(n // p for n, p in zip(section.input.shape, section.vision.patch, strict=True))


def _pull(tower: Callable[..., Any]) -> tuple[jax.Array, Callable[..., Taps], Inside]:
    """Runs the tower once; returns pooled [1, W], what pulls a slope by it back, and the inside."""
    _, shapes = jax.eval_shape(tower, None)
    zeros = {name: None if getattr(shapes, like) is None else jnp.zeros(getattr(shapes, like).shape)
             for name, like in (("places", "places"), ("cells", "cells"), ("mixed", "query"))}
    pooled, pull, inside = jax.vjp(tower, Taps(**zeros), has_aux=True)
    return pooled, lambda slope: pull(slope)[0], inside


def _by_gradients(section: Any, method: str, tower: Callable[..., Any],
                  score: Callable[..., Any]) -> jax.Array:
    """Maps [P, N] of a ViT by rollout, [P, *grid] by CAM."""
    pooled, pull, inside = _pull(tower)

    def shares(slopes: jax.Array, values: jax.Array) -> jax.Array:
        """What each place adds to the linearised score, where that is more than nothing."""
        return jnp.maximum((slopes * values).astype(jnp.float32).sum(axis=-1), 0.0)

    def one(slope: jax.Array) -> jax.Array:
        slopes = pull(slope[None])
        if inside.query is None:
            return shares(slopes.places, inside.places)[0]
        if method == "cam":
            cells, patches = _cells(section), inside.cells.shape[1]
            by_cell = (x[0].reshape(patches, int(np.prod(cells)), -1)
                       for x in (slopes.cells, inside.cells))
            return spread(shares(*by_cell), _grid(section, (patches,)), cells)
        if _by_cls(section.vision):
            # The token's own share may be negative; what it attended to is asked.
            row = jnp.zeros(inside.places.shape[1]).at[0].set(1.0)
        else:
            row = shares(slopes.places, inside.places)[0]
        return rollout(row, inside, slopes.mixed, section.vision.heads)[1:]

    return jax.lax.map(one, jax.jacrev(lambda rows: score(rows)[0])(pooled)[:, 0])


def automatic(model: Model) -> str:
    """The method that "auto" stands for."""
    vision = model.config.vision
    return "rollout" if "patch" in vision and not vision.get("stem", ()) else "cam"


def _cells(section: Any) -> tuple[int, ...]:
    """Cells of a ViT's patch along each axis: those its stem leaves, or the patch as one."""
    left = section.vision.patch
    if not section.vision.get("stem", ()):
        return (1,) * len(left)
    for size, _ in section.vision.stem:
        left = [n // s for n, s in zip(left, size, strict=True)]
    return tuple(left)


def spread(values: jax.Array, grid: Sequence[int], cells: Sequence[int]) -> jax.Array:
    """Lays [patches, cells of a patch], first axes slowest, out as one grid of cells."""
    rank = len(grid)
    order = [axis for pair in zip(range(rank), range(rank, 2 * rank), strict=True)
             for axis in pair]
    return values.reshape(*grid, *cells).transpose(order).reshape(
        [g * c for g, c in zip(grid, cells, strict=True)])


def _by_cls(vision: Any) -> bool:
    return vision.get("pool", "cls") == "cls"


def _pooled_places(vision: Any, tower: Callable[..., Any]) -> jax.Array:
    """What the tower would give if one place alone were pooled: [N, W] or [*grid, W]."""
    pooled, pull, inside = _pull(tower)
    places = inside.places[0]
    if inside.query is None:
        return places
    if _by_cls(vision):
        return places[1:]
    # The gradient of a pooled sum is the pool's weights.
    weights = pull(jnp.ones_like(pooled)).places[0, 1:]
    return places[1:] * weights * len(weights)


def _local_places(vision: Any, tower: Callable[..., Any]) -> jax.Array:
    """What the local head projects: [N, W] or [*grid, W]."""
    inside = tower(None)[1]
    return inside.places[0, 1:] if inside.before is None else inside.before[0]
