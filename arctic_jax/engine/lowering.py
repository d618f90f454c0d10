"""Lowering step programs in several processes. Engine start only; owned by the engine thread.

Tracing a step and lowering its kernels is Python's work, 1 to 3 s for each of some 20 programs.
Threads cannot share it. Each process here lowers for devices that it does not have, and sends back
what `jax.export` makes of it; this process has XLA compile that.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import subprocess
import sys
from typing import Any, BinaryIO

import jax
from jax.sharding import Mesh

from arctic_jax.engine.step_program import Step, StepProgram
from arctic_jax.pallas_kernels import dispatch
from arctic_jax.shift_parallel import make_mesh

_OPTIONS = ("jax_enable_x64", "jax_default_matmul_precision")


class LoweringPool:
    """Processes that lower the steps of one engine.

    Args:
        program: whose steps.
        mesh: the devices they are for.
        processes: how many.
    """

    def __init__(self, program: StepProgram, mesh: Mesh, processes: int) -> None:
        self._program, self._mesh = program, mesh
        platform = mesh.devices.flat[0].platform
        task = {
            "program": program,
            "mesh": (mesh.shape["tp"], mesh.shape["sp"]),
            "platform": "cuda" if platform == "gpu" else platform,
            "has_kernels": dispatch.mosaic_gpu_unavailable() is None,
            "options": {name: getattr(jax.config, name) for name in _OPTIONS},
        }
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(sys.path),
            "JAX_PLATFORMS": "cpu",
        }
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                start_new_session=True,  # Ctrl-C is for this process, which then closes the pool
            )
            for _ in range(processes)
        ]
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        for process in self._processes:
            with contextlib.suppress(OSError):  # `lower` will tell
                _send(process.stdin, task)
            self._idle.put(process)

    def lower(self, step: Step) -> jax.stages.Lowered:
        """Lower a step; called by as many threads as there are processes.

        Raises:
            RuntimeError: the process failed; the message holds its error.
        """
        process = self._idle.get()
        try:
            _send(process.stdin, step)
            answer = pickle.load(process.stdout)  # pyright: ignore[reportArgumentType]
        except (OSError, EOFError) as error:
            raise RuntimeError(f"a process that lowers programs ended: {error!r}") from error
        finally:
            self._idle.put(process)
        if isinstance(answer, str):
            raise RuntimeError(f"a program could not be lowered: {answer}")
        return self._program.lower_exported(answer, step, self._mesh)

    def close(self) -> None:
        """End the processes, whatever they are at."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.communicate()


def _send(pipe: Any, value: object) -> None:
    pickle.dump(value, pipe)
    pipe.flush()


def _work(tasks: BinaryIO, results: BinaryIO) -> None:
    """Lower what `tasks` names, until it ends."""
    task = pickle.load(tasks)
    tp, sp = task["mesh"]
    jax.config.update("jax_num_cpu_devices", tp * sp)
    for name, value in task["options"].items():
        jax.config.update(name, value)
    mesh = make_mesh(tp, sp)
    program: StepProgram = task["program"]
    with dispatch.lowering_for_hopper(task["has_kernels"]):
        while True:
            try:
                step = pickle.load(tasks)
            except EOFError:
                return
            try:
                answer = program.export(step, mesh, task["platform"])
            except Exception as error:
                answer = repr(error)
            _send(results, answer)


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "wb") as results:
        os.dup2(2, 1)  # whatever is printed goes to the log, not among the results
        _work(sys.stdin.buffer, results)
