"""Worker of benchmarks.step: our ViT, one turn for every line on stdin."""

import functools
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from brgsa_jax import paths
from brgsa_jax.nn.vit import vit3d


def build(spec: dict[str, Any]) -> Any:
    """The vision tower as BrgSA uses it: pooled by CLS, patch tokens only if asked for."""
    return vit3d(input_shape=spec["image"], remat="none", unroll=spec["depth"],
                 dtype=jnp.dtype(spec["dtype"]),
                 need_tokens=spec.get("all_tokens", False),
                 **{key: spec[key] for key in ("patch", "width", "depth", "heads", "mlp_width")})


def contrast(image: jax.Array, text: jax.Array) -> jax.Array:
    """InfoNCE of the images against fixed text embeddings, images to texts."""
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    logits = unit(image) @ unit(text).T / 0.07
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(len(logits))).mean()


def main() -> None:
    """Answers one line after another."""
    spec = json.loads(sys.argv[1])
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(spec["batch"], *spec["image"])).astype("f4"))
    text = jnp.asarray(rng.normal(size=(spec["batch"], spec["width"])).astype("f4"))
    module = build(spec)
    params = jax.jit(module.init)(jax.random.key(0), images[:1])
    file = Path(spec["folder"]) / "weights.npz"
    if not file.exists():
        np.savez(file, **{name: np.asarray(x) for name, x in
                          paths.flat(params["params"]).items()})
    optimizer = optax.adamw(1e-4)
    state = jax.jit(optimizer.init)(params)
    encode = jax.jit(lambda p, x: module.apply(p, x).pooled)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train(params, state, images):
        value, grads = jax.value_and_grad(
            lambda p: contrast(module.apply(p, images).pooled, text))(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    for line in sys.stdin:
        answer: dict[str, Any] = {}
        match line.strip():
            case "check":
                answer["output"] = np.asarray(encode(params, images[:2]))[:, :64].ravel().tolist()
            case "version":
                answer["version"] = f"jax {jax.__version__}"
            case "memory":
                device = jax.local_devices()[0].memory_stats() or {}
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
                answer["bytes"] = device.get("peak_bytes_in_use", peak)
            case "step":
                since = time.perf_counter()
                for _ in range(spec["steps"]):
                    if spec["mode"] == "inference":
                        last = encode(params, images)
                    else:
                        params, state, last = train(params, state, images)
                last.block_until_ready()
                answer["seconds"] = (time.perf_counter() - since) / spec["steps"]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
