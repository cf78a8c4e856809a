"""The training loop: steps, validation, checkpoints, metrics, and one agreement between ranks a step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import torch

from roformer_dist.batch import Batch
from roformer_dist.config import Config, RunShape, config_hash, dump_config
from roformer_dist.data.loader import StepData
from roformer_dist.data.state import DataState
from roformer_dist.engine.agreement import raise_together
from roformer_dist.engine.checkpoint import CheckpointReader, CheckpointWriter, latest_checkpoint
from roformer_dist.engine.console import RunConsole
from roformer_dist.engine.datasets import RunData
from roformer_dist.engine.engine import Engine, StepResult
from roformer_dist.engine.feed import Feed
from roformer_dist.engine.fragments import engine_fragments, load_engine, optimizer_step
from roformer_dist.engine.initial import start_from
from roformer_dist.engine.invariants import StepInvariants, check_targets
from roformer_dist.engine.metrics import MetricsLog, flops_per_token, memory_metrics
from roformer_dist.engine.run_dir import write_status
from roformer_dist.engine.schedule import learning_rate
from roformer_dist.engine.signals import StopFlag
from roformer_dist.parallel.layout import Layout
from roformer_dist.parallel.mesh import Mesh

Value = TypeVar("Value")


@dataclass(frozen=True)
class RunContext:
    """What a trainer is built from: everything that start-up decided."""

    config: Config
    shape: RunShape
    mesh: Mesh
    layout: Layout
    run_dir: Path
    matrix_rate: float
    stop: StopFlag
    lock: IO[str] | None  # rank 0's hold on the run directory, for as long as this process lives


class Trainer:
    """One rank of a run. ``run`` trains from the newest checkpoint to the end, or to a stop."""

    def __init__(self, context: RunContext, engine: Engine, data: RunData) -> None:
        self.context = context
        self.engine = engine
        self.data = data
        self.feed = Feed(data.loader, quarantine=context.config.data.on_corrupt == "quarantine")
        self.step = 0
        self.tokens_seen = 0
        self._failure: Exception | None = None
        self._damaged = False  # whether any rank found damage in the next step's data
        world = context.mesh.world
        checkpoint = context.config.checkpoint
        self._writer = CheckpointWriter(
            context.run_dir / "checkpoints", rank=world.rank, world_size=world.size, keep=checkpoint.keep
        )
        self._invariants = StepInvariants(context.mesh)
        self._speaks = world.rank == 0

    def run(self) -> bool:
        """Train; True when the run is finished, False when it was asked to stop.

        Raises:
            PeerError: another rank failed (see ``agreement``). Any other error is this rank's own.
        """
        num_steps = self.context.config.train.num_steps
        self._restore()
        self.console = RunConsole(num_steps, self.step, speaks=self._speaks)
        self._log = MetricsLog(self.context.run_dir, self.step) if self._speaks else None
        try:
            return self._loop(num_steps)
        finally:
            self._writer.abandon()
            self.console.close()
            if self._log:
                self._log.close()
            self.data.close()

    def _loop(self, num_steps: int) -> bool:
        if self.step >= num_steps:
            self.console.say(f"this run is finished: {self.step} of {num_steps} steps")
            if self._speaks:
                write_status(self.context.run_dir, "finished", self.step)
            return True
        self._announce()
        step_data = self._guard(self.feed.read)
        self._agree()
        step_data = self._without_damage(step_data)
        stopped = False
        while self.step < num_steps and not stopped:
            assert step_data is not None
            started, self.feed.wait = time.perf_counter(), 0.0
            result = self._train(step_data)
            self.step += 1
            self.tokens_seen += step_data.num_tokens
            position = step_data
            step_data = self._guard(self.feed.read) if self.step < num_steps else None
            nll_sum, num_valid, stopped = self._agree(result)
            step_data = self._without_damage(step_data)
            check_targets(num_valid, position.num_valid, self.step)
            elapsed = time.perf_counter() - started
            self._report(position, result, nll_sum / num_valid, elapsed)
            ended = stopped or self.step == num_steps
            self._validate_if_due(last=self.step == num_steps)
            if ended or self.step % self.context.config.checkpoint.every_steps == 0:
                self._save(position.state)
        self._finish_save()
        finished = self.step == num_steps
        if self._speaks:
            write_status(self.context.run_dir, "finished" if finished else "stopped", self.step)
        if not finished:
            self.console.say(
                f"stopped by {self.context.stop.requested or 'another rank'} after step {self.step}, saved; "
                "the same command goes on from there"
            )
        return finished

    def _train(self, data: StepData) -> StepResult:
        sp_rank = self.context.mesh.sp.rank
        local = [self.context.layout.slice(batch, sp_rank) for batch in data.micro_batches]
        self._invariants.see(data.micro_batches, local)
        lr = learning_rate(self.context.config, self.step)
        return self.engine.step(local, data.num_valid, lr)

    def _guard(self, action: Callable[[], Value]) -> Value | None:
        """Run what may fail on one rank alone; the failure is raised everywhere by ``_agree``."""
        try:
            return action()
        except Exception as error:
            self._failure = self._failure or error
            return None

    def _without_damage(self, step_data: StepData | None) -> StepData | None:
        """``step_data``, or while any rank found damage in it, the same step read again without that."""
        world = self.context.mesh.world
        while self._damaged:
            try:
                self.feed.leave_out(world, self.engine.device, self.console.say)
            except ValueError as error:
                raise_together(error, world, self.engine.device)
            step_data = self._guard(self.feed.read)
            self._agree()
        return step_data

    def _agree(self, result: StepResult | None = None) -> tuple[float, int, bool]:
        """One small sum over all ranks: ``(nll_sum, num_valid, whether anyone asks to stop)``.

        A failure on one rank rides along, so that all ranks raise at the same place instead of waiting
        for one that is gone; so does damage found in the next step's data, for ``_without_damage``.
        """
        failure = self._failure or self._writer.error
        numbers = [
            result.nll_sum if result else 0.0,
            float(result.num_valid) if result else 0.0,
            float(self.context.stop.requested is not None),
            float(failure is not None),
            float(len(self.feed.damage)),
            *self._invariants.numbers(result),
        ]
        local = torch.tensor(numbers, dtype=torch.float64, device=self.engine.device)
        sums = self.context.mesh.world.all_sum(local).tolist()
        nll_sum, num_valid, stops, failures, damaged = sums[:5]
        if failures:
            raise_together(failure, self.context.mesh.world, self.engine.device)
        self._damaged = damaged > 0
        if result:
            self._invariants.check(sums[5:], result, self.step, self.engine.device)
        return nll_sum, round(num_valid), stops > 0

    def _check_finite(self, what: str, value: float) -> None:
        """The value is the same on every rank, so all raise together."""
        if not math.isfinite(value):
            error = ValueError(
                f"{what} is {value} at step {self.step}; lower optimizer.lr or lengthen schedule.warmup_steps and "
                "start a new run"
            )
            raise_together(error, self.context.mesh.world, self.engine.device)

    def _report(self, data: StepData, result: StepResult, loss: float, elapsed: float) -> None:
        self._check_finite("the loss", loss)
        # DeepSpeed skips such an update without a word; the step would count as trained.
        self._check_finite("the gradient norm", result.grad_norm)
        config, due = self.context.config, self.step % self.context.config.logging.every_steps == 0
        tokens_per_sec = data.num_tokens / elapsed
        values = {
            "loss": loss,
            "grad_norm": result.grad_norm,
            "lr": learning_rate(config, self.step - 1),
            "tokens_per_sec": tokens_per_sec,
            "step_time": elapsed,
            "data_wait": self.feed.wait,
            "quarantined": data.state.num_quarantined,
            "tokens_seen": self.tokens_seen,
            "mfu": self._mfu(data, tokens_per_sec),
        }
        last = self.step == config.train.num_steps
        eta = (config.train.num_steps - self.step) * elapsed
        self.console.advance(self.step, values, eta_s=eta, log=due or last)
        if due or last:
            values |= self._slowest_and_largest(values)
            if self._log:
                self._log.log(self.step, values)

    def _mfu(self, data: StepData, tokens_per_sec: float) -> float:
        """Share of the measured matrix-product rate of all processes; a causal query counts half its context."""
        lengths = [d[1] for batch in data.micro_batches for d in batch.mask.documents]
        config = self.context.config
        flops = flops_per_token(config.model, lengths, config.objective) * tokens_per_sec
        return flops / (self.context.matrix_rate * self.context.shape.world_size)

    def _slowest_and_largest(self, values: dict[str, float]) -> dict[str, float]:
        """Of what differs between ranks, the most of any: the wait for data and the peak memory."""
        own = {"data_wait": values["data_wait"], **memory_metrics(self.engine.device)}
        local = torch.tensor(list(own.values()), dtype=torch.float64, device=self.engine.device)
        highest = self.context.mesh.world.all_gather(local).amax(0).tolist()
        return dict(zip(own, highest))

    def _validate_if_due(self, *, last: bool) -> None:
        if not last and self.step % self.context.config.validation.every_steps:
            return
        sp_rank, layout = self.context.mesh.sp.rank, self.context.layout

        def read() -> list[Batch]:
            return [layout.slice(batch, sp_rank) for batch in self.data.validation()]

        batches = self._guard(read)
        self._agree()
        assert batches is not None
        nll_sum, num_valid = self.engine.evaluate(iter(batches))
        local = torch.tensor([nll_sum, num_valid], dtype=torch.float64, device=self.engine.device)
        total, count = self.context.mesh.world.all_sum(local).tolist()
        if not count:
            error = ValueError(
                "validation has no target: give more validation.rows or a higher mask_probability"
            )
            raise_together(error, self.context.mesh.world, self.engine.device)
        loss = total / count
        self._check_finite("the validation loss", loss)
        if self._log:
            self._log.log(self.step, {"validation_loss": loss})
        self.console.say(f"step {self.step} · validation loss {loss:.4f} over {round(count):,} targets")

    def _save(self, data_state: DataState) -> None:
        self._finish_save()
        config = self.context.config
        state: dict[str, Any] = {
            "step": self.step,
            "tokens_seen": self.tokens_seen,
            "data": data_state.to_dict(),
            "config": config.model_dump(mode="json"),
            "config_hash": config_hash(config),
        }
        self._guard(
            lambda: self._writer.save(
                self.step,
                engine_fragments(self.engine.deepspeed),
                state,
                optimizer_step=optimizer_step(self.engine.deepspeed),
            )
        )
        if not config.checkpoint.background:
            self._finish_save()

    def _finish_save(self) -> None:
        """Wait for the save in the background, if any, and fail on all ranks if it failed on one.

        Rank 0 waits for the files of the others, so they must be known to be written first.
        """
        for waits in (not self._speaks, self._speaks):
            if waits:
                self._guard(self._writer.wait)
            self._agree()

    def _restore(self) -> None:
        """Load the newest undamaged checkpoint; rank 0 looks, all load."""
        world, directory = self.context.mesh.world, self.context.run_dir / "checkpoints"
        found = self._guard(lambda: self._newest(directory)) if world.rank == 0 else 0
        self._agree()
        chosen = torch.tensor([found or 0], dtype=torch.int64, device=self.engine.device)
        step = int(world.all_sum(chosen)) - 1
        if step < 0:
            loaded = start_from(self.context.config, self.engine, world)
            if loaded and self._speaks:
                print(loaded, flush=True)
            return
        reader = CheckpointReader(directory / f"step_{step:06d}")
        load_engine(self.engine.deepspeed, reader)
        self._guard(lambda: self.feed.resume(DataState.from_dict(reader.state["data"])))
        self._agree()
        self.step, self.tokens_seen = reader.state["step"], reader.state["tokens_seen"]

    def _newest(self, directory: Path) -> int:
        """The step of the newest undamaged checkpoint plus 1; 0 when there is none."""
        path = latest_checkpoint(directory, report=lambda text: print(text, flush=True))
        return CheckpointReader(path).step + 1 if path else 0

    def _announce(self) -> None:
        if self._speaks:
            write_status(self.context.run_dir, "running", self.step)
        if self._log:
            self._log.text(self.step, "config", dump_config(self.context.config))
        if self.step:
            self.console.say(f"resumed after step {self.step} ({self.tokens_seen:,} tokens seen)")
