"""`python -m moesaic.launch.demo.train`: tokenizer, training, evaluation, export, model card. Resumable.

Everything lands in `--work-dir`; the finished checkpoint in `--output`. On a terminal a progress bar shows loss,
tokens/s and time left; elsewhere a line is logged every few steps.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from moesaic.launch.demo import CHECKPOINT_DIR, DEFAULT_WORK_DIR
from moesaic.launch.demo.card import write_card
from moesaic.launch.demo.config import DemoConfig
from moesaic.launch.demo.corpus import Corpus, load_corpus
from moesaic.launch.demo.data import WindowStream, encode
from moesaic.launch.demo.environment import tune_process
from moesaic.launch.demo.export import export
from moesaic.launch.demo.measure import measure
from moesaic.launch.demo.model import DemoModel
from moesaic.launch.demo.tokenizer import train_tokenizer
from moesaic.launch.demo.trainer import StepReport, Trainer, TrainingConfig

DEFAULT_STEPS = 1360
LOG_EVERY = 20
SAVE_SECONDS = 180.0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the demo model from Python's standard library.")
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS, help="optimizer steps of 8192 tokens")
    parser.add_argument("--seed", type=int, default=0, help="decides initial weights and the order of the text")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    parser.add_argument("--work-dir", type=Path, default=DEFAULT_WORK_DIR, help="snapshots, tokenizer and log")
    parser.add_argument("--output", type=Path, default=CHECKPOINT_DIR, help="where the finished checkpoint goes")
    parser.add_argument("--no-export", action="store_true", help="stop after training")
    return parser.parse_args()


def prepare_tokenizer(corpus: Corpus, work_dir: Path, vocab_size: int) -> Tokenizer:
    """The work directory's tokenizer, learned from the training documents if it is not there yet."""
    path = work_dir / "tokenizer.json"
    if not path.exists():
        train_tokenizer((d.text for d in corpus.train), vocab_size).save(str(path))
    return Tokenizer.from_file(str(path))


class ProgressReport:
    """Shows steps on a terminal as a bar, elsewhere as log lines; keeps them all in log.jsonl."""

    def __init__(self, trainer: Trainer, log_path: Path) -> None:
        self.trainer = trainer
        self.console = Console()
        self.log = log_path.open("a", encoding="utf-8")
        self.bar = Progress(
            TextColumn("{task.fields[status]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
            speed_estimate_period=300,
        )
        self.task = self.bar.add_task("", total=trainer.config.steps, completed=trainer.next_step, status="")

    def show(self, report: StepReport, tokens_per_second: float) -> None:
        """One step."""
        left = (self.trainer.config.steps - report.step - 1) * self.trainer.config.batch_tokens / tokens_per_second
        status = (
            f"loss {report.loss:.3f}  mtp {report.mtp_loss:.3f}  violation {report.violation:.2f}  {tokens_per_second:,.0f} tok/s"
        )
        self.bar.update(self.task, advance=1, status=status)
        if report.step % LOG_EVERY == 0:
            line = {**vars(report), "tokens_per_second": round(tokens_per_second), "seconds": self.trainer.seconds}
            print(json.dumps(line), file=self.log, flush=True)
            if self.bar.disable:
                self.console.out(f"step {report.step}/{self.trainer.config.steps}  {status}  {left / 60:.0f} min left")


def run_training(trainer: Trainer, work_dir: Path) -> None:
    """Trains to the last step, leaving a snapshot every few minutes and at the end."""
    snapshot = work_dir / "snapshot.pt"
    if snapshot.exists():
        trainer.load(snapshot)
    report = ProgressReport(trainer, work_dir / "log.jsonl")
    saved_at, speed = time.monotonic(), 0.0
    with report.bar:
        while trainer.next_step < trainer.config.steps:
            started = time.monotonic()
            result = trainer.step()
            now = time.monotonic()
            trainer.seconds += now - started
            instant = trainer.config.batch_tokens / (now - started)
            speed = instant if speed == 0.0 else 0.95 * speed + 0.05 * instant
            report.show(result, speed)
            if now - saved_at > SAVE_SECONDS or trainer.next_step == trainer.config.steps:
                trainer.save(snapshot)
                saved_at = now


def finish(trainer: Trainer, tokenizer: Tokenizer, corpus: Corpus, arguments: argparse.Namespace) -> None:
    """Exports the trained model, measures the export on held-out text, writes the model card."""
    config, last = trainer.model.config, json.loads((arguments.work_dir / "log.jsonl").read_text().splitlines()[-1])
    export(trainer.model, tokenizer, arguments.output)
    figures = measure(trainer.model, arguments.output, tokenizer, corpus)
    run = {
        **dataclasses.asdict(trainer.config),
        "command": f"python -m moesaic.launch.demo.train --steps {arguments.steps} --seed {arguments.seed}",
        "minutes": trainer.seconds / 60,
        "epochs": trainer.config.steps * trainer.config.batch_tokens / trainer.stream.num_tokens,
        "loss": last["loss"],
        "mtp_loss": last["mtp_loss"],
    }
    sizes = parameter_counts(trainer.model)
    write_card(arguments.output, corpus=corpus, config=config, sizes=sizes, run=run, figures=figures)


def parameter_counts(model: DemoModel) -> dict[str, float]:
    """Millions of parameters in all, and those that one token of the main model is multiplied with."""
    config = model.config
    main = [(n, p) for n, p in model.named_parameters() if not n.startswith(f"layers.{config.num_hidden_layers}.")]
    share = config.num_experts_per_tok / config.n_routed_experts
    active = sum(p.numel() * (share if ".mlp.experts." in n else 1.0) for n, p in main)
    return {"total": sum(p.numel() for p in model.parameters()) / 1e6, "active": active / 1e6}


def main() -> None:
    """The whole pipeline."""
    tune_process("moesaic.launch.demo.train")
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    corpus, model_config = load_corpus(), DemoConfig()
    tokenizer = prepare_tokenizer(corpus, arguments.work_dir, model_config.vocab_size)
    stream = WindowStream(encode(tokenizer, corpus.train), arguments.seed)
    config = TrainingConfig(steps=arguments.steps, seed=arguments.seed)
    trainer = Trainer(model_config, config, stream)
    run_training(trainer, arguments.work_dir)
    if not arguments.no_export:
        finish(trainer, tokenizer, corpus, arguments)


if __name__ == "__main__":
    main()
