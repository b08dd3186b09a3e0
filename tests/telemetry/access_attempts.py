"""500 attempts to use a denied device: 25 ways in 20 situations, while an allowed caller uses the device all the time.

Run by test_access.py in a process whose policy allows the device `secret` to the caller `trainer` alone, who is known
by a secret. Prints JSON: how many attempts were made, what each kind of outcome was, and the breaches.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import json
import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

import hal_core as hal
from hal_core import plugin_api

torch.set_num_threads(1)
warnings.simplefilter("ignore")
q = torch.randn(1, 2, 3, 4)
ran: list[str] = []  # the callers for whom the denied device computed
hal.devices()
import secret_device  # noqa: E402 - the plugin's module, which the registry has loaded


def count(query: Any, key: Any, value: Any, mask: Any, request: Any) -> Any:
    ran.append(hal.current_caller())
    return (query @ key.mT * request.effective_scale).softmax(-1) @ value, None


secret_device.attend = count
Way = Callable[[], Any]


def attend(**named: Any) -> Any:
    hal.attention(q, q, q, **named)


def inside(block: Callable[[], Any], then: Way) -> Any:
    with block():
        return then()


def with_environment(name: str, value: str, then: Way) -> Any:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        plugin_api.registry.changed()
        plugin_api.registry.discover()
        return then()
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})


def configured(**named: Any) -> Any:
    try:
        hal.configure("secret", **named)
        attend()
    finally:
        hal.configure()


def rewritten() -> Any:
    """The file is replaced while the process runs."""
    with open(os.environ["HAL_ACCESS"]) as file:
        text = file.read()
    try:
        with open(os.environ["HAL_ACCESS"], "w") as file:
            file.write('[default]\ndevices = ["*"]\nregister = true\nkernels = ["*"]\n')
        plugin_api.registry.changed()
        attend(backend="secret")
    finally:
        with open(os.environ["HAL_ACCESS"], "w") as file:
            file.write(text)


def replayed() -> Any:
    record = json.loads(hal.explain(q, q, q).to_json())
    record["policy"] |= {"names": ["secret"], "caller": "trainer", "origin": "argument"}
    return hal.replay(record).winner


def decided() -> Any:
    request = hal.explain(q, q, q).request
    return plugin_api.decide(request, hal.Policy(names=("secret",), caller="trainer")).winner


def with_gradients() -> Any:
    x = q.clone().requires_grad_()
    hal.attention(x, x, x, backend="secret").sum().backward()


def mapped() -> Any:
    return torch.func.vmap(lambda x: hal.attention(x, x, x, backend="secret"))(q.expand(2, *q.shape))


WAYS: dict[str, Way] = {
    "by backend=": partial(attend, backend="secret"),
    "by device id": partial(attend, backend="secret:0"),
    "automatic, it is the fastest": attend,
    "automatic, simulated too": partial(attend, allow_simulated=True, transfer=True),
    "hal.use": partial(inside, lambda: hal.use("secret"), attend),
    "hal.prefer": partial(inside, lambda: hal.prefer(["secret", "open"]), attend),
    "hal.configure": configured,
    "hal.bind": lambda: hal.bind(q, q, q, backend="secret")(q, q, q),
    "hal.session": lambda: hal.session("secret"),
    "hal.memory": lambda: hal.memory("secret").allocate((4,), "float32"),
    "hal.kernel": lambda: hal.kernel("matmul", "secret"),
    "hal.kernel of any device": lambda: hal.kernel("matmul"),
    "hal.register of its class": lambda: hal.register(secret_device.Backend(), name="mine"),
    "hal.register of its spec": lambda: hal.register(hal.BackendSpec(name="mine", target="secret_device:Backend")),
    "a replayed record": replayed,
    "a policy with the caller's name": decided,
    "a calibration": lambda: plugin_api.calibrate("secret"),
    "open_session": lambda: plugin_api.open_session("secret:0"),
    "HAL_BACKEND": partial(with_environment, "HAL_BACKEND", "secret", attend),
    "HAL_ACCESS set to another file": partial(
        with_environment, "HAL_ACCESS", os.environ["HAL_ACCESS"] + ".mine", partial(attend, backend="secret")
    ),
    "HAL_ACCESS emptied": partial(with_environment, "HAL_ACCESS", "", partial(attend, backend="secret")),
    "the file rewritten": rewritten,
    "gradients": with_gradients,
    "torch.func.vmap": mapped,
    "a wrong secret": partial(inside, lambda: hal.caller("trainer", "guess"), lambda: hal.session("secret")),
}


def in_thread(way: Way) -> Any:
    found: list[Any] = []

    def run() -> None:
        try:
            found.append((way(), None))
        except BaseException as error:
            found.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    result, error = found[0]
    if error is not None:
        raise error
    return result


def in_pool(way: Way) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(way).result()


def in_task(way: Way) -> Any:
    async def run() -> Any:
        return way()

    return asyncio.run(run())


def in_asyncio_thread(way: Way) -> Any:
    async def run() -> Any:
        return await asyncio.to_thread(way)

    return asyncio.run(run())


def after_trainer(way: Way) -> Any:
    with hal.caller("trainer", "open sesame"):
        hal.attention(q, q, q, backend="secret")
    return way()


def blocks_out_of_order(way: Way) -> Any:
    trainer, other = hal.caller("trainer", "open sesame"), hal.caller("guest")
    trainer.__enter__()
    other.__enter__()
    trainer.__exit__()
    try:
        return way()
    finally:
        other.__exit__()


def after_generator(way: Way) -> Any:
    def held() -> Iterator[None]:
        with hal.caller("trainer", "open sesame"):
            yield

    generator = held()
    next(generator)
    generator.close()
    return way()


def thread_of_trainer(way: Way) -> Any:
    with hal.caller("trainer", "open sesame"):
        return in_thread(way)


def after_interrupt(way: Way) -> Any:
    with contextlib.suppress(KeyboardInterrupt), hal.caller("trainer", "open sesame"):
        raise KeyboardInterrupt
    return way()


def nested(way: Way) -> Any:
    with hal.caller("trainer", "open sesame"), hal.caller("guest"):
        return way()


SITUATIONS: dict[str, Callable[[Way], Any]] = {
    "plainly": lambda way: way(),
    "as guest": lambda way: inside(lambda: hal.caller("guest"), way),
    "as Trainer": lambda way: inside(lambda: hal.caller("Trainer"), way),
    "as trainer with a space": lambda way: inside(lambda: hal.caller("trainer "), way),
    "as *": lambda way: inside(lambda: hal.caller("*"), way),
    "as nobody": lambda way: inside(lambda: hal.caller(""), way),
    "in a thread": in_thread,
    "in a pool's thread": in_pool,
    "in a task": in_task,
    "in a task's thread": in_asyncio_thread,
    "in a copied context": lambda way: contextvars.copy_context().run(way),
    "in an empty context": lambda way: contextvars.Context().run(way),
    "in a meter": lambda way: inside(hal.meter, way),
    "watched": lambda way: inside(hal.watch, way),
    "after the trainer's block": after_trainer,
    "after blocks that ended out of order": blocks_out_of_order,
    "after the trainer's generator": after_generator,
    "in a thread that the trainer starts": thread_of_trainer,
    "after an interrupt of the trainer's block": after_interrupt,
    "nested in the trainer's block": nested,
}


def main() -> None:
    outcomes, breaches = Counter[str](), list[str]()
    stop = threading.Event()

    def train() -> None:
        with hal.caller("trainer", "open sesame"):
            while not stop.is_set():
                hal.attention(q, q, q, backend="secret")
                stop.wait(0.01)

    trainer = threading.Thread(target=train)
    trainer.start()
    for where, situation in SITUATIONS.items():
        for how, way in WAYS.items():
            try:
                found = situation(way)
            except hal.HalError as error:
                outcomes[type(error).__name__] += 1
            else:
                outcomes["another device" if found is None else "something else"] += 1
                winner = getattr(getattr(found, "device", None), "id", found)
                if winner is not None and winner != "open:0":
                    breaches.append(f"{how}, {where}: {found!r}")
            breaches += [f"{how}, {where}: ran for {caller!r}" for caller in ran if caller != "trainer"]
            if any(caller != "trainer" for caller in ran):
                ran.clear()
    stop.set()
    trainer.join()
    used = "trainer" in ran
    print(
        json.dumps({"attempts": len(WAYS) * len(SITUATIONS), "outcomes": outcomes, "breaches": breaches, "used": used})
    )


if __name__ == "__main__":
    main()
