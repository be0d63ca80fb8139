"""Tokenizers: where they come from, their pad token, their chat template, and tokens that are added to them."""

from datetime import datetime
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from alignkit.errors import ModelError
from alignkit.models.chat import SETTINGS, Chat
from alignkit.models.files import KNOWN, TEMPLATES, find_model_dir, has_tokenizer, inspect_model_dir, is_builtin
from alignkit.models.heads import TASK_TOKENS
from alignkit.models.hub import explain_hub_errors, quiet_transformers
from alignkit.models.scratch import builtin_tokenizer, learnt_tokenizer
from alignkit.models.template import list_settings
from alignkit.recipe.schema import LEARNT_TOKENIZERS
from alignkit.recipe.stage import Stage

_TEMPLATES = Path(__file__).with_name("templates")


def find_tokenizer(stage: Stage) -> tuple[str, str | None]:
    """Find where the tokenizer of a stage comes from, and its revision.

    It is what the stage starts from if that has one, else `model.tokenizer`, else `model.path`; RNNsearch, which comes
    without one, learns words.
    """
    start = find_model_dir(stage.start_dir) if stage.start_dir else None
    if start is not None and inspect_model_dir(start, trust_code=stage.trust_code).has_tokenizer:
        return str(start), None
    if stage.model.tokenizer:
        return stage.model.tokenizer, None
    if stage.model.path.startswith("builtin:rnn"):
        return LEARNT_TOKENIZERS[0], None
    return stage.model.path, stage.model.revision


def load_tokenizer(stage: Stage, *, learnt: str | None = None) -> PreTrainedTokenizerFast:
    """Load the tokenizer a stage trains with, its pad token, chat template and template settings set.

    `learnt` is the one that its rows made, where it is such. Builtin tokenizers speak chatml unless told otherwise. Of
    several templates all are kept, the chosen one as `default`. Raises ModelError or EnvironmentProblem.
    """
    source, revision = find_tokenizer(stage)
    if source in LEARNT_TOKENIZERS:
        assert learnt is not None, "learn_vocabulary of the train room reads the rows"
        tokenizer = learnt_tokenizer(learnt)
    elif is_builtin(source):
        tokenizer = builtin_tokenizer()
        tokenizer.chat_template = _read_template("chatml", tokenizer)
    else:
        remedy = "set model.tokenizer to the one its model was trained with"
        tokenizer = read_tokenizer(source, revision=revision, trust_code=stage.trust_code, remedy=remedy)
    require_eos(tokenizer, source)
    set_pad_token(tokenizer)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in stage.model.add_tokens])
    if stage.task is not None:
        added: dict[str, Any] = {"additional_special_tokens": list(TASK_TOKENS)}
        tokenizer.add_special_tokens(added, replace_extra_special_tokens=False)
    name, where = stage.model.chat_template, stage.where("model.chat_template")
    own = tokenizer.chat_template
    if isinstance(own, dict):
        if name in own or (name is None and len(own) == 1):
            tokenizer.chat_template = own | {"default": own.get(name) or next(iter(own.values()))}
            name = None
        elif name is None and "default" not in own:
            raise ModelError(f"{source} has several chat templates; name one: {', '.join(sorted(own))}", where=where)
    if name:
        tokenizer.chat_template = _read_template(name, tokenizer, where=where)
    found = tokenizer.chat_template or {}
    texts = found.values() if isinstance(found, dict) else [found]
    read = {setting for text in texts for setting in list_settings(text, where=name or f"{source} (chat template)")}
    settings = stage.model.chat_template_kwargs or {}
    if unread := sorted(settings.keys() - read):
        known = ", ".join(sorted(read)) or "no settings"
        what = f"the chat template does not read {', '.join(unread)}; it reads {known}"
        raise ModelError(what, where=stage.where("model.chat_template_kwargs"))
    if settings:
        tokenizer.init_kwargs[SETTINGS] = settings  # which a saved model keeps
    return tokenizer


def load_chat(stage: Stage, *, clock: datetime | None = None, learnt: str | None = None) -> Chat:
    """Load a stage's tokenizer with its template, which reads the time of `clock`."""
    name = stage.model.chat_template or "the tokenizer's own"
    tokenizer, halves = load_tokenizer(stage, learnt=learnt), stage.objective == "seq2seq"
    return Chat(tokenizer, clock=clock, name=name, encoder_decoder=halves)


def set_pad_token(tokenizer: PreTrainedTokenizerFast) -> None:
    """Give the tokenizer a pad token that is not its eos, where the vocabulary has a spare one; else the eos.

    A reward model reads its score at the last token that is not padding, so a shared token would hide the eos.
    Labels never depend on it: they are set by position.
    """
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    vocabulary = tokenizer.get_vocab()
    taken = {tokenizer.eos_token, tokenizer.bos_token}
    spare = [token for token in KNOWN["spare_tokens"] if token in vocabulary and token not in taken]
    tokenizer.pad_token = spare[0] if spare else tokenizer.eos_token


def check_vocabulary(tokenizer: PreTrainedTokenizerFast, vocab_size: int, *, model: str) -> None:
    """Raise ModelError when the tokenizer has ids that the embedding matrix does not."""
    highest = max(tokenizer.get_vocab().values())
    if highest >= vocab_size:
        what = f"the tokenizer has token ids up to {highest} but {model} has {vocab_size} embeddings; "
        raise ModelError(f"{what}set model.tokenizer to the tokenizer that belongs to the model")


def read_tokenizer(
    source: str, *, revision: str | None = None, trust_code: bool = False,
    remedy: str = "copy the one it was trained with into it",
) -> PreTrainedTokenizerFast:  # fmt: skip
    """Read the tokenizer of a directory, a run or a hub id; `remedy` is what to do where there is none."""
    directory = find_model_dir(source)
    if directory is not None and not has_tokenizer(directory):
        raise ModelError(f"{directory} has no tokenizer; {remedy}")
    with explain_hub_errors(source), quiet_transformers():
        place = str(directory or source)
        tokenizer = AutoTokenizer.from_pretrained(place, revision=revision, trust_remote_code=trust_code)
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"{source} has no fast tokenizer (tokenizer.json); convert it once; {remedy}")
    return tokenizer


def require_eos(tokenizer: PreTrainedTokenizerFast, source: str) -> None:
    """Raise ModelError for a tokenizer without a token that ends a text."""
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {source} has no eos token; set eos_token in its tokenizer_config.json")


def _read_template(name: str, tokenizer: PreTrainedTokenizerFast, *, where: str | None = None) -> str:
    """Read a shipped template or a file."""
    if name not in KNOWN["control_tokens"]:
        file = Path(name).expanduser()
        if not file.is_file():
            what = f"model.chat_template {name!r} is neither a file nor one of {', '.join(TEMPLATES)}"
            raise ModelError(what, where=where)
        return file.read_text(encoding="utf-8")
    missing = [token for token in KNOWN["control_tokens"][name] if token not in tokenizer.get_vocab()]
    if missing:
        what = f"model.chat_template {name!r} writes {' and '.join(missing)}, which the tokenizer does not have as "
        raise ModelError(f"{what}tokens; use plain, or zephyr, which need no control tokens", where=where)
    text = (_TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    # A text that is tokenised by the tokenizer alone would start with a BOS; a chat then does too, once.
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("a").input_ids[:1] == [bos]
    return "{{- bos_token }}" + text if adds_bos and "bos_token" not in text else text
