"""The train state and the one train step, jitted over a mesh or mapped over local devices.

`train.parallel="mesh"`: everything is laid over the ("data", "fsdp") mesh, the batch over both
axes, parameters over "fsdp", the bank's rows over both; losses run in one `jax.shard_map`.
`"pmap"`: data parallel over the devices of one process, the state whole on each of them. Either
way negatives, bank reads, batch statistics and means are over the global batch.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from brgsa_jax import mesh as meshes
from brgsa_jax import paths
from brgsa_jax.config import GROUPS, PREVALENCE, UserError, classifies, override, reads_text
from brgsa_jax.losses.common import l2_normalize
from brgsa_jax.losses.knowledge import read_bank
from brgsa_jax.losses.objective import Features, Objective, diagnostics, objective
from brgsa_jax.model import Model, init_bank
from brgsa_jax.network import Network, Towers, build
from brgsa_jax.nn.attention import PLATFORM_OF, Placement
from brgsa_jax.nn.norm import Scope
from brgsa_jax.train import optim

# The upper bound CLIP sets on its learned logit scale.
LARGEST_SCALE = 100.0

# Name of the device axis under pmap.
DEVICES = "devices"


class Batch(NamedTuple):
    """One global batch; under pmap every array has a leading axis of devices.

    To `Training.encode` only one side need be given, None stands for the rest.

    Attributes:
        volume: int16 HU [B, X, Y, Z], cropped, canonical LPS; or grey levels [B, H, W].
        ids: int32 token ids [B, T].
        mask: int32 attention mask [B, T].
        words: int32 [B, T], the word every token belongs to, -1 for padding.
        groups: int32 [B, m], columns `config.GROUPS`: equal ids match each other.
        labels: int8 [B, P], 1, 0 or -1 for unknown, where a classifier is trained; else None.
    """

    volume: jax.Array | None
    ids: jax.Array | None
    mask: jax.Array | None
    words: jax.Array | None
    groups: jax.Array | None
    labels: jax.Array | None = None


class Encoded(NamedTuple):
    """What the model that would be exported makes of a batch, as at inference.

    Attributes:
        image, text: [B, D] un-normalised; None of a side that was not given.
        image_bridged: what the images read from the bank, [B, D]; None without either.
        logits: [B, P] of the classifier; None without one or without images.
    """

    image: jax.Array | None
    text: jax.Array | None
    image_bridged: jax.Array | None
    logits: jax.Array | None


@flax.struct.dataclass
class TrainState:
    """All that training changes.

    Attributes:
        step: int32, updates done.
        params: tower and head parameters, and what the objective learns beside them.
        bank: [K, D] knowledge bank, rows sharded; None without one.
        stats: running batch statistics by part; None without any.
        opt: optimiser state over {"params", "bank"}.
        ema: average of {"params", "bank", "stats"}, or None.
        lr_scale: state of the plateau rule, whose scale multiplies the learning rate.
    """

    step: jax.Array
    params: Any
    bank: jax.Array | None
    stats: Any
    opt: Any
    ema: Any
    lr_scale: Any

    @property
    def weights(self) -> dict[str, Any]:
        """The one tree gradient, clipping and optimiser act on."""
        return {"params": self.params, "bank": self.bank}

    @property
    def model(self) -> dict[str, Any]:
        """The tree that is averaged and exported: the weights and the batch statistics."""
        return {"params": self.params, "bank": self.bank, "stats": self.stats}


class Training(NamedTuple):
    """What a run needs: pure functions and how state and batch lie on the devices.

    Attributes:
        init: seed -> TrainState on its devices, jitted; nothing is materialised unsharded.
        abstract: TrainState of shapes with shardings, the target of a restore.
        train_step: (state, batch) -> (state, metrics); the state is donated.
        eval_step: (state, batch) -> metrics.
        embed: (state, batch) -> (image [B, D], text [B, D]), whole on every device.
        encode: (state, batch of volumes, texts or both) -> Encoded, whole on every device.
        update_plateau: (state, loss) -> state after a validation.
        gather: state -> {"params", "bank", "stats"} to export, whole on every device.
        schedule: step -> learning rate before the plateau's scale.
        place: this process's rows of a batch, NumPy arrays -> Batch on the devices.
    """

    init: Callable[[int], TrainState]
    abstract: TrainState
    train_step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]
    eval_step: Callable[[TrainState, Batch], dict[str, jax.Array]]
    embed: Callable[[TrainState, Batch], tuple[jax.Array, jax.Array]]
    encode: Callable[[TrainState, Batch], Encoded]
    update_plateau: Callable[[TrainState, jax.Array], TrainState]
    gather: Callable[[TrainState], dict[str, Any]]
    schedule: Callable[[Any], jax.Array]
    place: Callable[[Any], Batch]


def make_training(config: Any, mesh: Mesh, *, per_epoch: int) -> Training:
    """Builds the compiled functions of one run.

    Args:
        config: whole configuration; model, losses, optim, train and mesh are read.
        mesh: from `mesh.make_mesh`; under pmap its devices are used, without "fsdp".
        per_epoch: steps of one epoch, for durations.

    Raises:
        UserError: batch, chunks or bank do not divide over the devices, a rule matches nothing,
            or what is asked cannot be combined, or not run on these devices.
    """
    mapped = config.train.parallel == "pmap"
    local = config.model.batch_statistics == "local"
    _check_batch(config, mesh)
    _check_attention(config.model, mesh)
    _check_classes(config)
    platform = mesh.devices.flat[0].platform
    if mapped:
        network = build(config.model, Scope(axis_name=DEVICES, local=local), Placement(platform),
                        tokens=False)
    else:
        # Towers in chunks run in a map over the devices as a whole.
        split = mesh.size == 1 or config.train.microbatch > 1
        network = build(config.model, Scope(shards=mesh.size if local else 1),
                        Placement(platform, None if split else meshes.over_rows(mesh)),
                        tokens=False)
    durations = {"steps": config.train.steps, "per_epoch": per_epoch}
    schedule = optim.learning_rate(config.optim, **durations)
    tx = optim.optimizer(config.optim, schedule, **durations)
    plateau = optax.contrib.reduce_on_plateau(
        factor=config.optim.plateau_factor, patience=config.optim.plateau_patience)
    bank = config.model.bank

    def create(seed: jax.Array) -> TrainState:
        params_key, bank_key = jax.random.split(jax.random.key(seed))
        model = {
            "params": network.init(params_key),
            "bank": init_bank(bank_key, bank.rows, config.model.embed_dim, bank.init)
            if bank.rows else None,
            "stats": network.init_stats(params_key) or None,
        }
        trained, _ = optim.split(config, {"params": model["params"], "bank": model["bank"]})
        # A copy, so that donation never sees one buffer twice.
        ema = jax.tree.map(jnp.copy, model) if config.optim.ema else None
        return TrainState(step=jnp.zeros((), jnp.int32), **model, opt=tx.init(trained), ema=ema,
                          lr_scale=plateau.init(trained))

    shapes = jax.eval_shape(create, jnp.zeros((), jnp.uint32))
    # Running statistics of what does not train stay as they are too.
    frozen = optim.frozen(config, shapes.weights)["params"]
    network = dataclasses.replace(network, frozen=frozenset(
        name for name in network.parts if all(jax.tree.leaves(frozen[name]))))
    _check_chunks(config, network)
    if mapped:
        specs = jax.tree.map(lambda _: P(), shapes)
    else:
        specs = _state_specs(shapes, mesh, config.mesh.rules)
    shardings = meshes.shardings(specs, mesh)
    abstract = jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        shapes, shardings)

    embed = functools.partial(_embed, network, chunks=config.train.microbatch,
                              mesh=None if mapped else mesh)
    objective_of = judge(config, mesh=None if mapped else mesh)
    texts = reads_text(config)

    def evaluate(weights: Any, stats: Any, batch: Batch, *, train: bool) -> tuple[Judged, Any]:
        seen = batch if texts else batch._replace(ids=None, mask=None, words=None)
        embedded, stats = embed(weights["params"], stats or {}, seen, train=train)
        judged = objective_of(embedded, batch.groups, weights["bank"], weights["params"],
                              batch.labels)
        return judged, stats or None

    def train_step(state: TrainState, batch: Batch):
        # Differentiated by the trained weights alone: the others cost no backward pass.
        trained, still = optim.split(config, state.weights)

        def loss(w: Any):
            judged, stats = evaluate(optim.join(w, still), state.stats, batch, train=True)
            return judged.objective.total, (judged, stats)

        (total, (judged, stats)), grads = jax.value_and_grad(loss, has_aux=True)(trained)
        if mapped:
            # The one reduction the losses ask for: see losses.common.
            grads = lax.pmean(grads, DEVICES)
        updates, opt = tx.update(grads, state.opt, trained)
        updates = jax.tree.map(lambda u: u * state.lr_scale.scale, updates)
        new = optax.apply_updates(trained, updates)
        if new["params"].get("prototypes") is not None:
            # The reference overwrites them by their unit vectors before every forward pass.
            new["params"]["prototypes"] = l2_normalize(new["params"]["prototypes"])
        logit = new["params"].get("logit", {})
        if logit.get("log_scale") is not None:
            # The parameter, not its use: beyond a clipped use no gradient would bring it back.
            logit["log_scale"] = jnp.minimum(logit["log_scale"], jnp.log(LARGEST_SCALE))
        new = optim.join(new, still)
        metrics = {"loss": total, **judged.objective.terms,
                   "grad_norm": optax.tree.norm(grads),
                   "learning_rate": schedule(state.step) * state.lr_scale.scale,
                   **judged.diagnostics}
        state = state.replace(step=state.step + 1, params=new["params"], bank=new["bank"],
                              stats=stats, opt=opt)
        if state.ema is not None:
            state = state.replace(ema=optim.ema_update(
                state.ema, state.model, config.optim.ema, state.step - 1))
        return state, metrics

    def eval_step(state: TrainState, batch: Batch):
        judged, _ = evaluate(state.weights, state.stats, batch, train=False)
        return {"loss": judged.objective.total, **judged.objective.terms}

    def embed_step(state: TrainState, batch: Batch):
        # Statistics of the batch: at the start the running ones know nothing yet.
        embedded, _ = embed(state.params, state.stats or {}, batch, train=True)
        pair = embedded.image, embedded.text
        return lax.all_gather(pair, DEVICES, tiled=True) if mapped else pair

    def encode(state: TrainState, batch: Batch) -> Encoded:
        model = _exported(state)
        embedded, _ = embed(model["params"], model["stats"] or {}, batch, train=False)
        bridged = None
        if model["bank"] is not None and embedded.image is not None:
            bridged = read_bank(embedded.image, model["bank"],
                                scale=config.model.bank.scale).reconstruction
        found = Encoded(embedded.image, embedded.text, bridged, embedded.logits)
        return lax.all_gather(found, DEVICES, tiled=True) if mapped else found

    def update_plateau(state: TrainState, loss: jax.Array) -> TrainState:
        _, lr_scale = plateau.update(state.weights, state.lr_scale, value=loss)
        return state.replace(lr_scale=lr_scale)

    replicated = meshes.replicated(mesh)
    batch_sharding = meshes.batch_sharding(mesh)
    if mapped:
        over = functools.partial(jax.pmap, axis_name=DEVICES, in_axes=(None, 0),
                                 devices=list(mesh.devices.flat))
        compiled = {"train_step": over(train_step, out_axes=None, donate_argnums=0),
                    "eval_step": over(eval_step, out_axes=None),
                    "embed": over(embed_step, out_axes=None),
                    "encode": over(encode, out_axes=None)}
    else:
        jit = functools.partial(jax.jit, in_shardings=(shardings, batch_sharding))
        compiled = {"train_step": jit(train_step, donate_argnums=0,
                                      out_shardings=(shardings, replicated)),
                    "eval_step": jit(eval_step, out_shardings=replicated),
                    "embed": jit(embed_step, out_shardings=replicated),
                    "encode": jit(encode, out_shardings=replicated)}
    create_sharded = jax.jit(create, out_shardings=shardings)
    return Training(
        init=lambda seed: create_sharded(jnp.uint32(seed)),
        abstract=abstract, **compiled,
        update_plateau=jax.jit(update_plateau, donate_argnums=0, out_shardings=shardings),
        gather=jax.jit(_exported, out_shardings=replicated),
        schedule=schedule,
        place=lambda rows: meshes.place(Batch(*rows), batch_sharding,
                                        mesh.size if mapped else None))


def _exported(state: TrainState) -> dict[str, Any]:
    """The weights that are exported: their average where one is kept."""
    return state.model if state.ema is None else state.ema


def model_of(config: Any, weights: dict[str, Any], tokenizer: Any) -> Model:
    """Makes the user-facing model of what `Training.gather` returned."""
    weights = jax.device_get(weights)
    return Model(config.model, weights["params"], weights["bank"], tokenizer, weights["stats"])


def check_finite(weights: Any) -> None:
    """Refuses to go on with weights that hold NaN or infinity.

    Raises:
        UserError: the first leaf that does.
    """
    for path, leaf in paths.flat(weights).items():
        if not bool(jnp.isfinite(leaf).all()):
            raise UserError(f"the weights are not finite (first {path}): the run has diverged; "
                            "train again with a lower optim.learning_rate in another work "
                            "directory")


def untrained_model(config: Any, tokenizer: Any) -> Model:
    """Makes the model a run with this configuration starts from."""
    mesh = meshes.make_mesh(1, 1, jax.local_devices()[:1])
    config = override(config, {"train.parallel": "mesh"})
    training = make_training(config, mesh, per_epoch=1)
    return model_of(config, training.gather(training.init(config.seed)), tokenizer)


def _embed(network: Network, params: Any, stats: Any, batch: Batch, *, train: bool, chunks: int,
           mesh: Mesh | None) -> tuple[Towers, Any]:
    """Towers and heads of a batch, the towers in `chunks` pieces of every device's rows.

    Gradients are those of the whole batch (GradCache, Gao et al. 2021, inside one program):
    heads, batch statistics and losses see all rows, only the towers run piece by piece and are
    run again in the backward pass. `mesh` is None for the rows of one device.
    """
    inputs = batch[:4]
    if chunks <= 1:
        if mesh is not None and batch.volume is not None:
            inputs = (meshes.constrain_batch(batch.volume, mesh), *inputs[1:])
        towers, tower_stats = network.run_towers(params, stats, *inputs, train=train)
    else:
        # Towers in chunks have fixed statistics or none: the new ones are the old ones.
        towers_of = functools.partial(network.run_towers, train=train)

        def run(params: Any, stats: Any, *inputs: jax.Array) -> Towers:
            return in_chunks(lambda *part: towers_of(params, stats, *part)[0], inputs, chunks)

        if mesh is not None:
            # Without varying-axes types the gradients of what all devices hold are summed once,
            # where they leave the map, not in every turn of the loop.
            rows = P(meshes.BATCH_AXES)
            run = jax.shard_map(run, mesh=mesh, in_specs=(P(), P(), *[rows] * len(inputs)),
                                out_specs=rows, check_vma=False)
        # Only what the towers need: parameters sharded at rest are gathered for the map.
        mine, tower_stats = ({name: tree[name] for name in ("vision", "text") if name in tree}
                             for tree in (params, stats))
        towers = run(mine, tower_stats, *inputs)
    projected, head_stats = network.run_heads(params, stats, towers, train=train)
    return projected, {**stats, **tower_stats, **head_stats}


def in_chunks(function: Callable[..., Any], rows: Sequence[jax.Array | None], chunks: int) -> Any:
    """Maps a function of rows over contiguous chunks of them, rematerialised in the gradient.

    The loop slices its inputs where they lie: as scanned-over inputs they would be copied whole.

    Args:
        function: (arrays [b/chunks, …]) -> tree of arrays [b/chunks, …].
        rows: arrays [b, …], or None.
        chunks: how many; must divide b.

    Returns:
        What `function` of all rows is, when it treats every row by itself.
    """
    size = len(jax.tree.leaves(rows)[0]) // chunks

    @jax.checkpoint
    def chunk(index: jax.Array) -> Any:
        return function(*jax.tree.map(
            lambda x: lax.dynamic_slice_in_dim(x, index * size, size), tuple(rows)))

    _, parts = lax.scan(lambda _, index: (None, chunk(index)), None, jnp.arange(chunks))
    return jax.tree.map(lambda x: x.reshape(chunks * size, *x.shape[2:]), parts)


class Judged(NamedTuple):
    """Objective and diagnostics of a batch."""

    objective: Objective
    diagnostics: dict[str, jax.Array]


def judge(config: Any, mesh: Mesh | None) -> Callable[..., Judged]:
    """Makes the objective and diagnostics of a configuration.

    Args:
        config: whole configuration; model and losses are read.
        mesh: over which embeddings are sharded; None is inside the pmap.

    Returns:
        (projected Towers, groups [B, m], bank [K, D] or None, params, labels [B, P] or None) ->
        Judged; of the parameters only what the objective learns beside the towers is read. There
        are no diagnostics where no loss reads texts.
    """
    losses = {name: {**term, "positives": tuple(GROUPS.index(g) for g in term["positives"])}
              if "positives" in term else term
              for name, term in ((n, t.to_dict()) for n, t in config.losses.items())}
    if "knowledge_interaction" in losses:
        losses["knowledge_interaction"]["scale"] = config.model.bank.scale
    if "token_alignment" in losses:
        losses["token_alignment"]["cross_attention_heads"] = config.model.cross_attention_heads
    columns = sorted({GROUPS.index("caption"),
                      *(c for term in losses.values() for c in term.get("positives", ()))})

    def of_features(features: Features, **axes: Any) -> Judged:
        return Judged(objective(features, losses, **axes),
                      {} if features.text is None else diagnostics(
                          features, columns, bank_scale=config.model.bank.scale, **axes))

    def of_embeddings(embedded: Towers, groups: jax.Array, bank: jax.Array | None,
                      params: Any, labels: jax.Array | None = None) -> Judged:
        shared = {name: params[name] for name in ("prototypes", "logit", "cross_attention")
                  if name in params}
        features = Features(**embedded._asdict(), groups=groups, bank=bank, shared=shared,
                            labels=labels)
        if mesh is None:
            return of_features(features, axis_name=DEVICES, rows_axis=None)
        return across(of_features, mesh)(features)

    return of_embeddings


def across(function: Callable[..., Any], mesh: Mesh) -> Callable[[Features], Any]:
    """Runs a function of this device's features in one shard_map; the result is replicated.

    Args:
        function: (features, axis_name=…, rows_axis=…) -> tree of scalars.
        mesh: a ("data", "fsdp") mesh.
    """
    axes = meshes.BATCH_AXES
    local = functools.partial(function, axis_name=axes, rows_axis=axes)

    def run(features: Features) -> Any:
        specs = Features(**{name: None if value is None else P() if name == "shared" else P(axes)
                            for name, value in features._asdict().items()})
        return jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=P())(features)

    return run


def _state_specs(shapes: TrainState, mesh: Mesh, rules: Any) -> TrainState:
    """Specs for a whole state: optimiser moments and EMA lie as the weights they belong to."""
    bank = P() if shapes.bank is None else meshes.bank_spec(shapes.bank.shape[0], mesh)
    params = meshes.parameter_specs(shapes.params, mesh, rules)
    weights = {"params": params, "bank": None if shapes.bank is None else bank}
    stats = jax.tree.map(lambda _: P(), shapes.stats)
    by_path = {path: (leaf.shape, spec) for (path, leaf), spec in zip(
        paths.flat(shapes.weights).items(),
        jax.tree.leaves(weights, is_leaf=lambda x: isinstance(x, P)), strict=True)}

    def follow(path: str, leaf: Any) -> P:
        """The spec of the weight whose path this one ends with."""
        parts = path.split("/")
        for start in range(len(parts)):
            shape, spec = by_path.get("/".join(parts[start:]), (None, None))
            if shape == leaf.shape:
                return spec
        return P()

    return TrainState(step=P(), params=params, bank=weights["bank"], stats=stats,
                      opt=paths.map_with_path(follow, shapes.opt),
                      ema={**weights, "stats": stats} if shapes.ema is not None else None,
                      lr_scale=jax.tree.map(lambda _: P(), shapes.lr_scale))


def _check_chunks(config: Any, network: Network) -> None:
    """Refuses to run towers in chunks that would have their own batch statistics."""
    batch_norm = config.model.vision.get("norm") == "batch" and "vision" not in network.frozen
    if config.train.microbatch > 1 and batch_norm:
        raise UserError("train.microbatch cannot chunk a vision tower with batch statistics: its "
                        "rows depend on each other; set model.vision.norm=frozen, or "
                        "train.microbatch=0")


def _check_attention(config: Any, mesh: Mesh) -> None:
    """Refuses attention kernels that the devices or the number format do not have."""
    platform = mesh.devices.flat[0].platform
    for tower in ("vision", "text"):
        key = f"model.{tower}.implementation"
        form = config[tower].get("implementation")
        needed = PLATFORM_OF.get(form, platform)
        if platform != needed:
            kind = {"gpu": "NVIDIA GPUs", "tpu": "TPUs"}[needed]
            raise UserError(f"{key}={form} runs on {kind}, and this run has {platform} "
                            f"devices; set {key}=auto")
        if form == "cudnn" and config.dtype == "float32":
            raise UserError(f"{key}=cudnn computes in 16 bits, and model.dtype is float32; set "
                            f"{key}=auto, or model.dtype=bfloat16")


def _check_classes(config: Any) -> None:
    """Refuses a classifier whose classes and weights the data set has still to fill in."""
    if classifies(config) and not config.model.classes:
        raise UserError("model.classes=() takes its names from the data set; name them, as in "
                        "model.classes=('Emphysema', 'Lung nodule')")
    if classifies(config) and PREVALENCE in config.losses.classification.positive_weights:
        raise UserError(f"losses.classification.positive_weights=({PREVALENCE!r},) is counted from "
                        "the data set; give a number for each class, or ()")


def _check_batch(config: Any, mesh: Mesh) -> None:
    """Refuses what does not divide over the devices, or cannot be combined."""
    batch, chunks = config.data.batch_size, max(config.train.microbatch, 1)
    if batch % (mesh.size * chunks):
        unit = mesh.size * chunks
        pieces = f" × {chunks} chunks of train.microbatch" if chunks > 1 else ""
        raise UserError(f"data.batch_size={batch} does not divide over {mesh.size} devices"
                        f"{pieces}; choose a multiple such as {-(-batch // unit) * unit}")
    alone = [f"model.{key}=local" for key in ("batch_statistics",) if config.model[key] == "local"]
    alone += [f"losses.{name}.negatives=local" for name, term in config.losses.items()
              if term.weight and term.get("negatives") == "local"]
    if alone and batch == mesh.size:
        raise UserError(f"{alone[0]} needs two rows or more on each device, and data.batch_size="
                        f"{batch} gives {mesh.size} devices one each; raise data.batch_size, or "
                        "take global")
    if config.train.parallel == "pmap":
        if jax.process_count() > 1:
            raise UserError("train.parallel=pmap is for the devices of one process, and there are "
                            f"{jax.process_count()}; use train.parallel=mesh")
        if mesh.shape["fsdp"] > 1:
            raise UserError("train.parallel=pmap keeps all parameters on every device; set "
                            "mesh.fsdp=1, or train.parallel=mesh")
