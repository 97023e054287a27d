"""Programs that tests start as processes of their own, which signal themselves at chosen places.

    python member.py train PLAN                     trains the work directories of a plan in turn
    python member.py at MODULE:NAME:CALL COMMAND…   runs brgsa; that call comes with SIGTERM

A signal from outside would come at another place whenever the machine is busy.
"""

import functools
import gc
import importlib
import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path


def train(plan):
    """Trains each {"config", "workdir"}; "signal" is (process, number, call of the stop point).

    Equal configurations share what is traced; the state they start from is drawn.
    """
    import drawn
    import jax

    from brgsa_jax import config as configs
    from brgsa_jax.runtime import initialize_runtime
    from brgsa_jax.train import trainer

    # Tracing makes many small objects that live on.
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    made = {}

    def make_training(config, mesh, **options):
        key = configs.to_json(config)
        made[key] = made.get(key) or drawn.training(config, mesh, **options)
        return made[key]

    def signalled(stop, index, number, call):
        calls = itertools.count(1)

        def asked():
            if next(calls) == call:
                if jax.process_index() == index:
                    os.kill(os.getpid(), number)
                # Until the word has come round: where they stop must not depend on who is faster.
                while not stop._held and stop._last is None:
                    time.sleep(0.001)
            return stop()

        return asked

    trainer.make_training = make_training
    with initialize_runtime() as stop:
        for part in json.loads(Path(plan).read_text()):
            outcome = trainer.train(
                configs.get_config(part["config"]), part["workdir"],
                stop=signalled(stop, *part["signal"]) if "signal" in part else stop)
    return trainer.PREEMPTED if outcome.preempted else 0


def at(place, *command):
    """Runs brgsa with a SIGTERM at one call of a function or method."""
    module, path, call = place.split(":")
    *outer, name = path.split(".")
    owner = functools.reduce(getattr, outer, importlib.import_module(module))
    function, calls = getattr(owner, name), itertools.count(1)

    def signalled(*args, **options):
        if next(calls) == int(call):
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*args, **options)

    setattr(owner, name, signalled)
    from brgsa_jax.cli import main

    return main(command)


if __name__ == "__main__":
    sys.exit({"train": train, "at": at}[sys.argv[1]](*sys.argv[2:]))
