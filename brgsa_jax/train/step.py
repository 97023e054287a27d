"""The train state and the one jitted train step.

Everything is laid over the ("data", "fsdp") mesh: the batch over both axes, parameters over
"fsdp", the bank's rows over both. Losses run in one `jax.shard_map`, so that negatives, bank
reads and means are over the global batch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from brgsa_jax import mesh as meshes
from brgsa_jax import paths
from brgsa_jax.config import UserError
from brgsa_jax.losses.objective import Features, objective
from brgsa_jax.model import Model, Network, build, init_bank
from brgsa_jax.train import optim


class Batch(NamedTuple):
    """One global batch.

    Attributes:
        volume: int16 HU [B, X, Y, Z], cropped, canonical LPS.
        ids: int32 token ids [B, T].
        mask: int32 attention mask [B, T].
        groups: int32 [B], equal for captions that say the same.
    """

    volume: jax.Array
    ids: jax.Array
    mask: jax.Array
    groups: jax.Array


@flax.struct.dataclass
class TrainState:
    """All that training changes.

    Attributes:
        step: int32, updates done.
        params: tower and head parameters.
        bank: [K, D] knowledge bank, rows sharded; None without one.
        opt: optimiser state over {"params", "bank"}.
        ema: average of {"params", "bank"}, or None.
        lr_scale: state of the plateau rule, whose scale multiplies the learning rate.
    """

    step: jax.Array
    params: Any
    bank: jax.Array | None
    opt: Any
    ema: Any
    lr_scale: Any

    @property
    def weights(self) -> dict[str, Any]:
        """The one tree gradient, clipping, optimiser, EMA and export act on."""
        return {"params": self.params, "bank": self.bank}


class Training(NamedTuple):
    """What a run needs: pure functions and how the state lies on the mesh.

    Attributes:
        init: seed -> sharded TrainState, jitted; nothing is materialised unsharded.
        abstract: TrainState of shapes with shardings, the target of a restore.
        train_step: (state, batch) -> (state, metrics); the state is donated.
        eval_step: (state, batch) -> metrics.
        update_plateau: (state, loss) -> state after a validation.
        gather: state -> {"params", "bank"} to export, whole on every device.
        schedule: step -> learning rate before the plateau's scale.
    """

    init: Callable[[int], TrainState]
    abstract: TrainState
    train_step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]
    eval_step: Callable[[TrainState, Batch], dict[str, jax.Array]]
    update_plateau: Callable[[TrainState, jax.Array], TrainState]
    gather: Callable[[TrainState], dict[str, Any]]
    schedule: Callable[[Any], jax.Array]


def make_training(network: Network, config: Any, mesh: Mesh, *, per_epoch: int) -> Training:
    """Builds the jitted functions of one run.

    Args:
        network: from `model.build`.
        config: whole configuration; model.bank, losses, optim, train and mesh are read.
        mesh: from `mesh.make_mesh`.
        per_epoch: steps of one epoch, for durations.

    Raises:
        UserError: batch or bank does not divide over the devices, or a rule matches nothing.
    """
    _check_batch(config.data.batch_size, mesh)
    schedule = optim.learning_rate(config.optim, steps=config.train.steps, per_epoch=per_epoch)
    tx = optim.optimizer(config.optim, schedule)
    plateau = optax.contrib.reduce_on_plateau(
        factor=config.optim.plateau_factor, patience=config.optim.plateau_patience)
    losses = {name: term.to_dict() for name, term in config.losses.items()}
    frozen = config.model.bank.frozen

    def create(seed: jax.Array) -> TrainState:
        params_key, bank_key = jax.random.split(jax.random.key(seed))
        bank = config.model.bank
        weights = {
            "params": network.init(params_key),
            "bank": init_bank(bank_key, bank.rows, config.model.embed_dim, bank.init)
            if bank.rows else None,
        }
        # A copy, so that donation never sees one buffer twice.
        ema = jax.tree.map(jnp.copy, weights) if config.optim.ema else None
        return TrainState(step=jnp.zeros((), jnp.int32), params=weights["params"],
                          bank=weights["bank"], opt=tx.init(weights), ema=ema,
                          lr_scale=plateau.init(weights))

    shapes = jax.eval_shape(create, jnp.zeros((), jnp.uint32))
    specs = _state_specs(shapes, mesh, config.mesh.rules)
    shardings = meshes.shardings(specs, mesh)
    abstract = jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        shapes, shardings)
    replicated = meshes.replicated(mesh)
    batch_sharding = meshes.batch_sharding(mesh)

    def terms_of(weights: Any, batch: Batch):
        image = network.embed_volume(weights["params"],
                                     meshes.constrain_batch(batch.volume, mesh))
        text = network.embed_text(weights["params"], batch.ids, batch.mask)
        bank = weights["bank"]
        if frozen and bank is not None:
            bank = jax.lax.stop_gradient(bank)
        return sharded_objective(Features(image, text, bank, batch.groups), losses, mesh)

    def train_step(state: TrainState, batch: Batch):
        weights = state.weights

        def loss(w: Any):
            result = terms_of(w, batch)
            return result.total, result.terms

        (total, terms), grads = jax.value_and_grad(loss, has_aux=True)(weights)
        updates, opt = tx.update(grads, state.opt, weights)
        updates = jax.tree.map(lambda u: u * state.lr_scale.scale, updates)
        if frozen:
            updates["bank"] = jax.tree.map(jnp.zeros_like, updates["bank"])
        new = optax.apply_updates(weights, updates)
        ema = state.ema
        if ema is not None:
            ema = optim.ema_update(ema, new, config.optim.ema, state.step)
        metrics = {"loss": total, **terms, "grad_norm": optax.tree.norm(grads),
                   "learning_rate": schedule(state.step) * state.lr_scale.scale}
        return state.replace(step=state.step + 1, params=new["params"], bank=new["bank"],
                             opt=opt, ema=ema), metrics

    def eval_step(state: TrainState, batch: Batch):
        result = terms_of(state.weights, batch)
        return {"loss": result.total, **result.terms}

    def update_plateau(state: TrainState, loss: jax.Array) -> TrainState:
        _, lr_scale = plateau.update(state.weights, state.lr_scale, value=loss)
        return state.replace(lr_scale=lr_scale)

    create_sharded = jax.jit(create, out_shardings=shardings)
    return Training(
        init=lambda seed: create_sharded(jnp.uint32(seed)),
        abstract=abstract,
        train_step=jax.jit(train_step, donate_argnums=0,
                           in_shardings=(shardings, batch_sharding),
                           out_shardings=(shardings, replicated)),
        eval_step=jax.jit(eval_step, in_shardings=(shardings, batch_sharding),
                          out_shardings=replicated),
        update_plateau=jax.jit(update_plateau, donate_argnums=0, out_shardings=shardings),
        gather=jax.jit(lambda state: state.weights if state.ema is None else state.ema,
                       out_shardings=replicated),
        schedule=schedule)


def model_of(config: Any, weights: dict[str, Any], tokenizer: Any) -> Model:
    """Makes the user-facing model of what `Training.gather` returned."""
    weights = jax.device_get(weights)
    return Model(config.model, weights["params"], weights["bank"], tokenizer)


def untrained_model(config: Any, tokenizer: Any) -> Model:
    """Makes the model a run with this configuration starts from."""
    mesh = meshes.make_mesh(1, 1, jax.local_devices()[:1])
    training = make_training(build(config.model), config, mesh, per_epoch=1)
    return model_of(config, training.gather(training.init(config.seed)), tokenizer)


def sharded_objective(features: Features, losses: Any, mesh: Mesh) -> Any:
    """Runs `objective` in one shard_map over the batch axes; the result is replicated."""
    axes = meshes.BATCH_AXES
    present = [x for x in features if x is not None]
    where = [i for i, x in enumerate(features) if x is not None]

    def local(*arrays: jax.Array) -> Any:
        filled = dict(zip(where, arrays, strict=True))
        mine = Features(*(filled.get(i) for i in range(len(features))))
        return objective(mine, losses, axis_name=axes, rows_axis=axes)

    return jax.shard_map(local, mesh=mesh, in_specs=(P(axes),) * len(present),
                         out_specs=P())(*present)


def _state_specs(shapes: TrainState, mesh: Mesh, rules: Any) -> TrainState:
    """Specs for a whole state: optimiser moments and EMA lie as the weights they belong to."""
    bank = P() if shapes.bank is None else meshes.bank_spec(shapes.bank.shape[0], mesh)
    params = meshes.parameter_specs(shapes.params, mesh, rules)
    weights = {"params": params, "bank": None if shapes.bank is None else bank}
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

    return TrainState(step=P(), params=params, bank=weights["bank"],
                      opt=paths.map_with_path(follow, shapes.opt),
                      ema=weights if shapes.ema is not None else None,
                      lr_scale=jax.tree.map(lambda _: P(), shapes.lr_scale))


def _check_batch(batch_size: int, mesh: Mesh) -> None:
    if batch_size % mesh.size:
        raise UserError(f"data.batch_size={batch_size} does not divide over {mesh.size} devices; "
                        f"choose a multiple such as {-(-batch_size // mesh.size) * mesh.size}")
