"""Train a small LLaVA-like model on T1, rsfMRI and dMRI scans with Hugging Face's Trainer.

    python examples/umbrella/train.py --config examples/umbrella/t1_fmri.yaml
    torchrun --nproc-per-node 2 examples/umbrella/train.py --config examples/umbrella/all.yaml
    python examples/umbrella/train.py --config examples/umbrella/all.yaml --resume

The scans and libraries come with `pip install '.[demo,transformers]'`. Exit code 0 means
that all promises held on every rank, 1 that one did not, 2 that the configuration is wrong.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from umbrella_config import ConfigError, load_config


def main(argv: Sequence[str] | None = None) -> int:
    """Run on this rank; returns the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True, help="YAML file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="in place of the file's"
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        metavar="CHECKPOINT",
        help="go on from this checkpoint, by default from the last one in the folder of the run",
    )
    options = parser.parse_args(argv)
    try:
        config = load_config(options.config, options.set)
        if options.resume is True and not any(Path(config.out).glob("checkpoint-*")):
            raise ConfigError(f"There is no checkpoint in {config.out}/ to resume from.")
    except (ConfigError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    # Only now, so that a wrong configuration is told at once.
    from umbrella_report import judge
    from umbrella_training import make_trainer

    trainer = make_trainer(config)
    trainer.train(resume_from_checkpoint=options.resume)
    trainer.save_state()
    held = judge(trainer, config)
    if dist.is_initialized():
        # Threads of gloo that are still busy when Python ends abort: pytorch/pytorch#179291.
        time.sleep(0.2)
        dist.destroy_process_group()
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
