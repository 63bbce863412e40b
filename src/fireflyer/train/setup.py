"""From a recipe and a folder to everything a run needs. All that can be wrong with what the user gave is found here.

In: a Recipe, the run's folder. Out: first `Inputs` (what it learns from, read and checked, with nothing written), then,
under the run's lock, the folder and a `RunState`: new, from another checkpoint, or as the newest good one left it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from fireflyer.checkpoint.adapter import open_adapter
from fireflyer.checkpoint.hf import load_model, load_opened
from fireflyer.checkpoint.published import open_checkpoint, resolve_checkpoint
from fireflyer.checkpoint.run import find_checkpoint, remove_leftovers, write_text
from fireflyer.checkpoint.run_folder import RECIPE, TOKENIZER, writing
from fireflyer.config import ModelConfig
from fireflyer.cost.training_memory import PROCESS
from fireflyer.data.counting import check_enough_data, count_tokens
from fireflyer.data.held_out import HeldOutRows, held_out_rows
from fireflyer.data.loader import Loader
from fireflyer.data.mixture import Mixture, open_sources
from fireflyer.errors import UserError
from fireflyer.evaluate.identity import checkpoint_identity
from fireflyer.infer.paged_cache import free_bytes
from fireflyer.model.decoder import Decoder, init_weights_
from fireflyer.parallel.ranks import ALONE, Ranks
from fireflyer.parallel.stages import PipelineSettings
from fireflyer.parallel.started import world_size
from fireflyer.text.tokenizer import Tokenizer
from fireflyer.train.events import Event, Notice
from fireflyer.train.extension import ExtendSettings
from fireflyer.train.lora import attach_adapters, fill_adapters
from fireflyer.train.memory import check_memory
from fireflyer.train.objective import Objective
from fireflyer.train.optimizer import DecoderOptimizer, build_optimizer
from fireflyer.train.phased_loader import LoaderPhase, PhasedLoader
from fireflyer.train.precision import autocast, check_precision, set_precision
from fireflyer.train.pretraining import Pretraining
from fireflyer.train.recipe import (
    read_recipe,
    recipe_differences,
    take_stored_choices,
    to_toml,
    with_epoch_tokens,
)
from fireflyer.train.schedule import batch_size_at
from fireflyer.train.settings import Recipe
from fireflyer.train.snapshot import restore

_TOKENIZER_SETTINGS = "tokenizer_config.json"


@dataclass(frozen=True)
class Inputs:
    """What a run reads. `recipe` has every open choice made: device, dtype, threads, length in tokens.

    objective: what it learns from, around the model that is to learn it.
    alone: whether it can't be shared out over ranks.
    """

    recipe: Recipe
    tokenizer: Tokenizer
    objective: Callable[[Decoder], Objective[Any]]
    alone: bool = True


InputsOpener = Callable[[Recipe, Path, Recipe | None, Callable[[Event], None]], Inputs]
"""Reads and checks all that a run reads, as `open_inputs` does for pretraining."""


@dataclass
class RunState:
    """What a run is at one step; a checkpoint holds all of it."""

    model: Decoder
    optimizer: DecoderOptimizer
    objective: Objective[Any]
    average: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0
    tokens: int = 0
    train_s: float = 0.0
    base_sha256: str | None = None
    """Of the checkpoint that adapters are trained beside; it isn't in the run's own."""
    ranks: Ranks = ALONE
    """Who shares the work. Of the model, the optimizer's state and the average a rank of several has its part."""


def check_folder(recipe: Recipe, run_dir: Path) -> Recipe | None:
    """The recipe stored in the folder, None where no run is in it yet.

    Raises UserError where another run, or something else, lies there.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"{run_dir}: a file is there; give a new folder for the run")
    if (run_dir / RECIPE).is_file():
        stored = read_recipe(run_dir / RECIPE)
        if differences := recipe_differences(stored, recipe):
            raise UserError(
                f"{run_dir} holds a run of another recipe: {'; '.join(differences)}; use the first command's settings"
                " to go on with it, or give another folder"
            )
        return stored
    others = [path.name for path in run_dir.iterdir() if not path.name.startswith(".")] if run_dir.exists() else []
    if others:
        raise UserError(f"{run_dir} has {others[0]} in it but no {RECIPE}: no run to go on with; give a new folder")
    return None


def open_inputs(recipe: Recipe, run_dir: Path, stored: Recipe | None, on_event: Callable[[Event], None]) -> Inputs:
    """Pretraining's data and tokenizer, read and checked, and the recipe's open choices made. Writes nothing.

    Raises UserError.
    """
    recipe = choose(recipe if stored is None else take_stored_choices(recipe, stored))
    check_tables(recipe, "pretrain", "extend")
    if stored is None and recipe.device == "cpu" and world_size() == 1:
        check_memory(recipe, free_bytes(torch.device("cpu")) + PROCESS)  # this process has its own part already
    mixture = _open_mixture(recipe, recipe.data.sources)
    tokenizer = _open_tokenizer(recipe, run_dir, mixture, on_event)
    if recipe.epochs is not None and recipe.steps is None and recipe.tokens is None:
        recipe = with_epoch_tokens(recipe, count_tokens(mixture, tokenizer))
    if recipe.extend is None:
        check_enough_data(mixture, tokenizer, batch_size=batch_size_at(recipe, 0), seq_len=recipe.seq_len)
        mixtures = [mixture]
    else:
        mixtures = _open_phases(recipe, recipe.extend, mixture, tokenizer)
    if recipe.init_from is not None and stored is None:
        _check_same_shape(recipe.init_from, open_checkpoint(recipe.init_from).config, recipe)
    held_out = _open_held_out(recipe, mixture, tokenizer)

    def objective(model: Decoder) -> Pretraining:
        rows = _open_rows(recipe, mixtures, tokenizer, on_event)
        return Pretraining(recipe, model, tokenizer, rows, held_out)

    return Inputs(recipe, tokenizer, objective, alone=False)


def check_tables(recipe: Recipe, verb: str, *own: str) -> None:
    """Refuse a table that `verb` doesn't read. Raises UserError."""
    tables = {
        "lora": recipe.lora,
        "dpo": recipe.dpo,
        "grpo": recipe.grpo,
        "distill": recipe.distill,
        "extend": recipe.extend,
    }
    for name, table in tables.items():
        if table is not None and name not in own:
            raise UserError(f"the recipe has [{name}], which fireflyer {verb} doesn't read; leave it out")


def choose(recipe: Recipe) -> Recipe:
    """The recipe with device, dtype and threads chosen where it leaves them open. Raises UserError for what isn't here.

    A GPU is taken where there is one, and bf16 there; on a CPU fp32, which is twice as fast as bf16 on most.
    """
    device = chosen_device(recipe)
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    number = int(device.partition(":")[2] or 0)
    if not present[device.partition(":")[0]] or (number and number >= torch.cuda.device_count()):
        raise UserError(f"device = {device} isn't on this machine; leave it out, or --set device=cpu")
    if recipe.compile:
        _check_compiler(device)
    dtype = recipe.dtype if recipe.dtype != "auto" else "bf16" if device.startswith("cuda") else "fp32"
    threads = recipe.threads or torch.get_num_threads()
    recipe = recipe.model_copy(update={"device": device, "dtype": dtype, "threads": threads})
    check_precision(recipe)
    return recipe


def chosen_device(recipe: Recipe) -> str:
    """That of the recipe, or the best one here."""
    return recipe.device if recipe.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def _check_compiler(device: str) -> None:
    """torch.compile needs a C++ compiler (on a GPU, Triton); what it raises without one is of a dozen kinds."""
    try:
        torch.compile(lambda x: x.exp() + 1)(torch.zeros(8, device=device))
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        raise UserError(
            f"compile = true: torch.compile doesn't work here ({first_line}); --set compile=false"
        ) from error


def lay_out(inputs: Inputs, run_dir: Path) -> None:
    """Write the resolved recipe and the tokenizer into the run's folder, and clear what killed saves left in it.

    Raises UserError where the disk refuses.
    """
    with writing(run_dir):
        remove_leftovers(run_dir)
        text = to_toml(inputs.recipe)
        if not (run_dir / RECIPE).is_file() or (run_dir / RECIPE).read_text(encoding="utf-8") != text:
            write_text(run_dir / RECIPE, text)
        if not (run_dir / TOKENIZER).is_file():
            with TemporaryDirectory() as folder:
                inputs.tokenizer.save(folder)
                for name in (_TOKENIZER_SETTINGS, TOKENIZER):  # the second tells that both are there
                    write_text(run_dir / name, (Path(folder) / name).read_bytes().decode("utf-8"))


def recipe_sha256(recipe: Recipe) -> str:
    """Hash of the recipe as it is stored."""
    return hashlib.sha256(to_toml(recipe).encode()).hexdigest()


def open_state(inputs: Inputs, run_dir: Path, on_event: Callable[[Event], None], ranks: Ranks = ALONE) -> RunState:
    """The run as its newest good checkpoint left it, or at its beginning; of several ranks, each one's part.

    Raises UserError.
    """
    recipe = inputs.recipe
    found = find_checkpoint(run_dir)
    if found.path is None and found.damaged:
        raise UserError(
            f"{run_dir}: none of its checkpoints is whole ({'; '.join(found.damaged)}); copy them again, or remove the"
            " folder to begin anew"
        )
    if found.path is not None and recipe.lora is None:
        model = load_model(found.path, dtype=torch.float32, device=recipe.device)
    else:
        model = _first_model(recipe, inputs.tokenizer)
    if recipe.lora is not None:
        attach_adapters(model, recipe.lora, recipe.seed)
        if found.path is not None:
            fill_adapters(model, open_adapter(found.path))
    if line := set_precision(model, recipe):
        on_event(Notice(line))
    parallel = recipe.parallel
    stages = PipelineSettings(
        schedule=parallel.schedule,
        stages=parallel.stages,
        mask_documents=recipe.data.mask_documents,
        recompute=parallel.recompute,
        around=lambda: autocast(recipe),
    )
    ranks.prepare(model, stages)
    objective = inputs.objective(model)
    if isinstance(objective, Pretraining):
        objective.ranks = ranks
    state = RunState(model, build_optimizer(model, recipe), objective, ranks=ranks)
    if recipe.lora is not None and recipe.init_from is not None:
        state.base_sha256 = checkpoint_identity(resolve_checkpoint(recipe.init_from))["sha256"]
    if found.path is not None:
        for line in found.damaged:
            on_event(Notice(f"passed over a damaged checkpoint: {line}"))
        stored = restore(found.path, model, state.optimizer, state.average, ranks)
        if stored.get("base_sha256") != state.base_sha256:
            raise UserError(
                f"--from {recipe.init_from}: it changed since {run_dir} was saved, and adapters hold for the weights"
                " that they were trained beside; put it back, or begin another run"
            )
        state.objective.load_state_dict(stored["data"])
        state.step, state.tokens, state.train_s = stored["step"], stored["tokens"], stored["train_s"]
    return state


def _open_tokenizer(recipe: Recipe, run_dir: Path, mixture: Mixture, on_event: Callable[[Event], None]) -> Tokenizer:
    if (run_dir / TOKENIZER).is_file():
        tokenizer = Tokenizer.from_file(run_dir / TOKENIZER)
    elif recipe.data.tokenizer is not None:
        tokenizer = Tokenizer.from_file(recipe.data.tokenizer)
    else:
        on_event(Notice(f"training a tokenizer of {recipe.model.vocab_size} tokens on the data"))
        tokenizer = Tokenizer.train(mixture.sample_texts(recipe.seed), recipe.model.vocab_size)
    if tokenizer.vocab_size > recipe.model.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model only model.vocab_size ="
            f" {recipe.model.vocab_size}; give the tokenizer that belongs to it"
        )
    return tokenizer


def _open_held_out(recipe: Recipe, mixture: Mixture, tokenizer: Tokenizer) -> HeldOutRows | None:
    if not recipe.eval_every:
        return None
    if recipe.eval_data is not None:
        mixture = _open_mixture(recipe, recipe.eval_data, held_out=1.0)
    return held_out_rows(
        mixture,
        tokenizer,
        recipe.seq_len,
        recipe.eval_rows,
        batch_size=recipe.parallel.micro_batch_size or recipe.batch_size,
        mask_documents=recipe.data.mask_documents,
    )


def _open_mixture(recipe: Recipe, sources: list[str], held_out: float | None = None) -> Mixture:
    data = recipe.data
    return open_sources(
        sources,
        encoding_errors=data.encoding_errors,
        text_column=data.text_column,
        seed=recipe.seed,
        held_out=data.held_out if held_out is None else held_out,
    )


def _open_phases(recipe: Recipe, extend: ExtendSettings, mixture: Mixture, tokenizer: Tokenizer) -> list[Mixture]:
    """Each phase's text, enough of it for a batch."""
    mixtures = [mixture if phase.sources is None else _open_mixture(recipe, phase.sources) for phase in extend.phases]
    for phase, own in zip(extend.phases, mixtures, strict=True):
        check_enough_data(own, tokenizer, batch_size=phase.batch_size, seq_len=phase.seq_len)
    return mixtures


def _open_rows(
    recipe: Recipe, mixtures: list[Mixture], tokenizer: Tokenizer, on_event: Callable[[Event], None]
) -> Loader | PhasedLoader:
    """What the run reads. mixtures: one, or one a phase of [extend]."""
    if recipe.extend is None:
        return _open_loader(recipe, mixtures[0], tokenizer, recipe.seq_len)
    phases = []
    for number, (phase, mixture) in enumerate(zip(recipe.extend.phases, mixtures, strict=True)):
        loader = _open_loader(recipe, mixture, tokenizer, phase.seq_len)
        goes_on = number > 0 and mixture is mixtures[number - 1]
        what = f"phase {number + 1}: sequences of {phase.seq_len:,} tokens, {phase.batch_size:,} a step"
        phases.append(LoaderPhase(loader, phase.steps, goes_on, what))
    return PhasedLoader(phases, lambda what: on_event(Notice(what)))


def _open_loader(recipe: Recipe, mixture: Mixture, tokenizer: Tokenizer, seq_len: int) -> Loader:
    return Loader(
        mixture,
        tokenizer,
        seq_len=seq_len,
        seed=recipe.seed,
        fim_rate=recipe.data.fim_rate,
        mask_documents=recipe.data.mask_documents,
    )


def _first_model(recipe: Recipe, tokenizer: Tokenizer) -> Decoder:
    """The model at step 0, in fp32: random by the seed (the same on every device), or a checkpoint's."""
    torch.manual_seed(recipe.seed)
    config = recipe.model.replace(
        bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id
    )
    if recipe.init_from is None:
        model = Decoder(config)
        init_weights_(model, torch.Generator().manual_seed(recipe.seed))
        return model.to(recipe.device)
    # Built for the recipe's config, not the files': YaRN is part of what attention is built with.
    return load_opened(replace(open_checkpoint(recipe.init_from), config=config), torch.float32, recipe.device)


def _check_same_shape(path: str, loaded: ModelConfig, recipe: Recipe) -> None:
    free = {"bos_token_id", "eos_token_id", "pad_token_id", "quantization_config", "extra", "initializer_range"}
    if recipe.extend is not None:
        free |= {"rope_scaling", "max_position_embeddings"}
    asked = recipe.model
    for key in ModelConfig.model_fields.keys() - free:
        if getattr(loaded, key) != getattr(asked, key):
            raise UserError(
                f"--from {path}: the checkpoint has model.{key} = {getattr(loaded, key)}, the recipe"
                f" {getattr(asked, key)}; give the checkpoint's: --set model.{key}={getattr(loaded, key)}"
            )
