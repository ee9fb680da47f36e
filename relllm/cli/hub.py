"""Checkpoints to keep and to share: `relllm merge`, `card` and `push`."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from relllm.hub.sharing import CardSettings, MergeSettings, PushSettings

from .options import console, from_settings

app = typer.Typer()


@app.command()
@from_settings
def merge(settings: MergeSettings) -> None:
    """Write the full checkpoint of a light one: with its towers in it, and the processor's files.

    Example: relllm merge runs/stage2/checkpoint-900 --out re-llm
    """
    from relllm.hub.staging import merge_checkpoint

    merge_checkpoint(settings)
    console.print(f"Full checkpoint: {settings.output_dir}")


@app.command()
@from_settings
def card(settings: CardSettings) -> None:
    """Write the README.md of a checkpoint for the Hub, with the metrics of runs that measured it.

    Example: relllm card runs/eval-iemocap runs/eval-esd --model re-llm --repo-id org/re-llm
    """
    from relllm.hub.cards import told_terms, write_model_card

    with _plain_errors_of_the_hub():
        path = write_model_card(settings)
    console.print(f"Card: {path}{'' if settings.runs else ' (no run given: it says “not evaluated”)'}")
    licence, corpora = told_terms(path)
    console.print(f"Licence: {licence}")
    for terms in corpora:
        console.print(f"Trained on {terms}")


@app.command()
@from_settings
def push(settings: PushSettings) -> None:
    """Check a checkpoint and send it to the Hub. Run it again after an interruption: it sends what is missing.

    Example: relllm push re-llm org/re-llm --with-code --dry-run
    """
    from relllm.hub.push import push_checkpoint

    with _plain_errors_of_the_hub():
        done = push_checkpoint(settings)
    for name, size in done.files.items():
        console.print(f"{size:>15,}  {name}")
    console.print(f"{sum(done.files.values()):>15,}  bytes in {len(done.files)} files")
    for what, told in (
        (f"Goes from {settings.repo_id}", ", ".join(done.removed)),
        (f"What goes from {settings.repo_id} is not known", done.unseen),
        ("Stays here", ", ".join(done.left_out)),
    ):
        if told:
            console.print(f"{what}: {told}")
    console.print(done.url if done.url else "Nothing was sent (--dry-run).")


@contextmanager
def _plain_errors_of_the_hub() -> Iterator[None]:
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except HTTPError as error:
        raise OSError(str(error)) from error
    except RuntimeError as error:  # of an upload
        raise OSError(f"{error} {error.__cause__ or ''}") from error
