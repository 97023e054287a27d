"""The loss on the split "valid" while a run trains."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from brgsa_jax.config import UserError
from brgsa_jax.data import feed
from brgsa_jax.data import tokenizer as tok
from brgsa_jax.data.summaries import open_captioned
from brgsa_jax.train.step import Training, TrainState


def validation_loss(config: Any, training: Training, state: TrainState,
                    tokenizer: tok.Tokenizer, stop: Callable[[], bool]) -> jax.Array | None:
    """Mean loss over the split "valid" with centre crops and unshuffled captions.

    None where `stop`, which is asked before every batch, ends it.
    """
    losses = []
    for batch in feed.eval_batches(validation_split(config), config.data, tokenizer,
                                   process_index=jax.process_index(),
                                   process_count=jax.process_count()):
        if stop():
            return None
        losses.append(training.eval_step(state, training.place(batch))["loss"])
    return jnp.mean(jnp.stack(losses))


def validation_split(config: Any) -> Any:
    """Opens the split "valid".

    Raises:
        UserError: it is missing, or holds less than one batch.
    """
    source = open_captioned(config.data, "valid")
    if len(source) < config.data.batch_size:
        raise UserError(f"the split valid of {config.data.path} holds {len(source)} volumes, less "
                        f"than one batch of {config.data.batch_size}; lower data.batch_size, or "
                        "set train.eval_every=0")
    return source
