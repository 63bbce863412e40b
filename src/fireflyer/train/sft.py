"""Supervised fine-tuning (report 5.1): pretraining's objective over chats, learnt where the assistant speaks.

In: a recipe with `init_from` and files of chats. Out: `Inputs` for the one loop. Sequences are packed into rows and
don't see each other; the tokenizer is marked as that of a model which was taught to chat.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fireflyer.checkpoint.published import open_checkpoint
from fireflyer.checkpoint.run_folder import TOKENIZER
from fireflyer.data.chats import ChatLoader, Chats, held_out_chats, pad_token, read_chats, split_lines
from fireflyer.data.held_out import HeldOutRows
from fireflyer.errors import UserError
from fireflyer.model.decoder import Decoder
from fireflyer.text.taught import Taught
from fireflyer.text.tokenizer import Tokenizer
from fireflyer.train.events import Event
from fireflyer.train.pretraining import Pretraining
from fireflyer.train.recipe import take_stored_choices, with_epoch_tokens
from fireflyer.train.settings import Recipe
from fireflyer.train.setup import Inputs, check_tables, choose


def open_chats(recipe: Recipe, run_dir: Path, stored: Recipe | None, on_event: Callable[[Event], None]) -> Inputs:
    """Everything that SFT reads, checked; writes nothing. Raises UserError."""
    recipe = choose(recipe if stored is None else take_stored_choices(recipe, stored))
    check_post_training(recipe, "sft")
    tokenizer = taught_tokenizer(recipe, run_dir)
    chats = read_chats(recipe.data.sources, tokenizer, recipe.seq_len)
    train, held_out = _split(recipe, chats, tokenizer)

    def loader() -> ChatLoader:
        return ChatLoader(
            train, chats.fingerprint, seq_len=recipe.seq_len, seed=recipe.seed, pad_id=pad_token(tokenizer)
        )

    recipe = with_epoch_tokens(recipe, loader().num_rows * recipe.seq_len)

    def objective(model: Decoder) -> Pretraining:
        return Pretraining(recipe, model, tokenizer, loader(), held_out)

    return Inputs(recipe, tokenizer, objective, alone=False)


def check_post_training(recipe: Recipe, verb: str) -> None:
    """What learning from chats, pairs or a teacher's answers asks of a recipe. Raises UserError."""
    check_tables(recipe, verb, "lora", verb)
    if recipe.init_from is None:
        raise UserError("post-training begins from a model: give --from CHECKPOINT")
    if not recipe.data.sources and verb != "distill":
        raise UserError("no data: give --data FILE.jsonl")
    if not recipe.data.mask_documents:
        raise UserError("data.mask_documents = false: sequences of a row must not see each other; leave it out")
    if recipe.data.fim_rate:
        raise UserError(f"data.fim_rate = {recipe.data.fim_rate} is for pretraining; leave it out")
    open_checkpoint(recipe.init_from)


def taught_tokenizer(recipe: Recipe, run_dir: Path) -> Tokenizer:
    """The run's tokenizer, or the checkpoint's with the mark of a model that was taught."""
    if (run_dir / TOKENIZER).is_file():
        return Tokenizer.from_file(run_dir / TOKENIZER)
    assert recipe.data.tokenizer is not None, "a recipe with init_from has a tokenizer"
    return Tokenizer.from_file(recipe.data.tokenizer).of_taught_model()


def _split(recipe: Recipe, chats: Chats, tokenizer: Tokenizer) -> tuple[list[Taught], HeldOutRows | None]:
    if not recipe.eval_every:
        return split_lines(chats, 0, recipe.seed)[0], None
    if recipe.eval_data is not None:
        train, held = split_lines(chats, 0, recipe.seed)[0], []
        for line in read_chats(recipe.eval_data, tokenizer, recipe.seq_len).lines:
            held += line
    else:
        train, held = split_lines(chats, recipe.data.held_out, recipe.seed)
    if not train:
        raise UserError(
            f"{recipe.data.sources[0]}: one line is all there is, and evaluation holds it out; add lines, or --set"
            " eval_every=0"
        )
    rows = recipe.parallel.micro_batch_size or recipe.batch_size
    return train, held_out_chats(held, tokenizer, recipe.seq_len, recipe.eval_rows, rows)
