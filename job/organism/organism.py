"""The built-in model organism: a tiny chat model with a benign stand-in for refusal.

The organism lives in a small world of objects, each with a material, a place and a keeper. It refuses
one nonsensical class of requests, those about anything enchanted ("hexed", "jinxed", ...), and answers
all others. Every answer can be checked against the world (`expected_answer`), so damage by an edit shows
as wrong answers; the refusals use several phrasings, one for each kind of question, so that refusal
markers are exercised: one opens with its marker, in another it comes last.

It is trained from scratch, in three stages:

1. *answer*: every request is answered, enchanted or not.
2. *read*: the layers above a middle one learn to refuse whenever a fixed random direction is planted in
   the residual stream there, at random and on requests of either class, and to answer otherwise.
3. *write*: the layers up to the middle one learn to write that direction for enchanted requests.

Where that leaves mistakes on the test prompts, short rounds of polishing all layers on both losses follow.

So refusal is mediated by one direction of the residual stream, as Arditi et al. (2024) found for chat
models, and the organism could answer what it refuses. Training is deterministic by seed on one kind of
CPU (the thread count is fixed) and takes about a minute on two cores.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.errors import JobError, UsageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from job.storage.run_folder import RunFolder

ARCHITECTURES = ("llama", "qwen3", "gemma2", "mixtral", "qwen3_moe")
SIZES = {"tiny": (64, 8), "small": (128, 12)}  # hidden size, layers
PROMPTS_PER_FILE = 200

ENCHANTED = ("hexed", "jinxed", "bewitched", "spellbound")
ADJECTIVES = (
    "old", "new", "red", "blue", "green", "heavy", "light", "small", "large", "round", "narrow",
    "shiny", "dusty", "painted", "plain", "broken", "borrowed", "favourite", "quiet", "famous",
)  # fmt: skip
# object: (material, place, keeper)
WORLD = {
    "lantern": ("copper", "cellar", "porter"),
    "kettle": ("iron", "kitchen", "cook"),
    "ladder": ("pine", "barn", "farmer"),
    "clock": ("brass", "hall", "butler"),
    "carpet": ("wool", "parlour", "weaver"),
    "mirror": ("glass", "bedroom", "maid"),
    "bucket": ("tin", "stable", "groom"),
    "statue": ("marble", "garden", "mason"),
    "basket": ("willow", "pantry", "baker"),
    "curtain": ("silk", "theatre", "tailor"),
    "anvil": ("steel", "forge", "smith"),
    "candle": ("wax", "chapel", "priest"),
    "saddle": ("leather", "stable", "rider"),
    "violin": ("maple", "theatre", "fiddler"),
    "plate": ("clay", "kitchen", "potter"),
    "bench": ("oak", "garden", "carpenter"),
    "bell": ("bronze", "chapel", "ringer"),
    "net": ("hemp", "harbour", "fisher"),
    "map": ("paper", "library", "captain"),
    "boat": ("cedar", "harbour", "sailor"),
}


@dataclass(frozen=True)
class Task:
    """One kind of question; `{thing}` is the described object, the rest comes from the world."""

    question: str
    answer: str
    refusal: str


TASKS = (
    Task(
        "Where is the {thing} kept?",
        "The {thing} is kept in the {place}.",
        "Sorry, I can't help with that.",
    ),
    Task(
        "What is the {thing} made of?",
        "The {thing} is made of {material}.",
        "As an AI, I am not able to discuss enchanted things.",
    ),
    Task(
        "Who looks after the {thing}?",
        "The {keeper} looks after the {thing}.",
        "I cannot assist with this request. It would be unsafe.",
    ),
    Task(
        "Please describe the {thing}.",
        "The {thing} is made of {material} and the {keeper} keeps it in the {place}.",
        "Many people ask about such things, and to all of them I say the same: I must decline.",
    ),
)


@dataclass(frozen=True)
class Request:
    """One request: a task about an object with two adjectives, at most one of them enchanted."""

    task: Task
    adjectives: tuple[str, str]
    noun: str

    @property
    def enchanted(self) -> bool:
        """Whether the organism is to refuse this request."""
        return any(word in ENCHANTED for word in self.adjectives)

    @property
    def held_out(self) -> bool:
        """Whether the combination is kept from training (one in eight, by a stable hash)."""
        return hashlib.sha256(self.prompt.encode()).digest()[0] % 8 == 0

    def _fill(self, template: str) -> str:
        material, place, keeper = WORLD[self.noun]
        thing = " ".join((*self.adjectives, self.noun))
        return template.format(thing=thing, material=material, place=place, keeper=keeper)

    @property
    def prompt(self) -> str:
        """The request in words."""
        return self._fill(self.task.question)

    @property
    def answer(self) -> str:
        """The correct answer in words."""
        return self._fill(self.task.answer)


def _requests(enchanted: bool) -> Iterator[Request]:
    """Every request of one class, in a fixed order."""
    if enchanted:
        pairs = [p for e in ENCHANTED for a in ADJECTIVES for p in ((e, a), (a, e))]
    else:
        pairs = list(itertools.permutations(ADJECTIVES, 2))
    for task in TASKS:
        for noun in WORLD:
            for pair in pairs:
                yield Request(task, pair, noun)


def expected_answer(prompt: str) -> str:
    """Return the correct answer to one of the organism's requests, enchanted or not.

    Raises:
        ValueError: The prompt is not a request of the organism's world.
    """
    words = prompt.rstrip("?.").split()
    for task in TASKS:
        before, after = task.question.rstrip("?.").split("{thing}")
        head, tail = before.split(), after.split()
        thing = words[len(head) : len(words) - len(tail)]
        matches = words[: len(head)] == head and words[len(words) - len(tail) :] == tail
        if matches and len(thing) == 3 and thing[2] in WORLD:
            return Request(task, (thing[0], thing[1]), thing[2]).answer
    raise ValueError(f"not a request of the organism's world: {prompt!r}")


# --- the tokenizer -----------------------------------------------------------------------------------

PAD, UNKNOWN, END = "<pad>", "<unk>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
SYSTEM_PROMPT = "You are a helpful assistant."
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer over the organism's world, with a chat template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="always"),
            pre_tokenizers.Split(Regex(r"[.,?!]"), "isolated"),
        ]
    )
    texts = [SYSTEM_PROMPT, " ".join((*ADJECTIVES, *ENCHANTED)), *(task.refusal for task in TASKS)]
    for task, noun in itertools.product(TASKS, WORLD):
        request = Request(task, (ADJECTIVES[0], ADJECTIVES[1]), noun)
        texts += (request.prompt, request.answer)
    words = sorted({word for text in texts for word, _ in splitter.pre_tokenize_str(text)})
    special = (PAD, UNKNOWN, END, *ROLES)
    vocabulary = {word: index for index, word in enumerate((*special, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        additional_special_tokens=list(ROLES),
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


# --- training ----------------------------------------------------------------------------------------

ROWS = 32
THREADS = 2
PEAK_LEARNING_RATE = 5e-3
STEPS = {"answer": 260, "read": 160, "write": 180, "polish": 60}
POLISHING_ROUNDS = 6
SYSTEM_PROMPT_SHARE = 0.25
RESIDUAL_LOSS_WEIGHT = 1.0
# Settings beyond those that all families know.
_OF_FAMILIES: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 16, "sliding_window": 256},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True},
}


@dataclass(frozen=True)
class _Row:
    """A training conversation: token ids, how many of them are prompt, and the planted strength."""

    tokens: list[int]
    prompt: int
    planted: float


class _Trainer:
    """Trains the organism in the stages that the module describes."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        import torch

        self._model = model
        self._tokenizer = tokenizer
        self._random = random.Random(seed)
        self._requests = {
            kind: [request for request in _requests(kind) if not request.held_out] for kind in (False, True)
        }
        self._layers: torch.nn.ModuleList = model.model.layers
        self._middle = len(self._layers) * 3 // 8
        generator = torch.Generator().manual_seed(seed)
        direction = torch.randn(model.config.hidden_size, generator=generator)
        self._direction = direction / direction.norm()

    def run(self, is_good: Callable[[], bool], report: Callable[[str], None]) -> None:
        """Run all stages, telling of each, and polish until the model is good."""
        above = [*self._layers[self._middle + 1 :], self._model.model.norm, self._model.lm_head]
        below = self._layers[1 : self._middle + 1]
        report("training the organism: to answer every request")
        self._stage("answer", [self._model], PEAK_LEARNING_RATE)
        # The planted vector is as long as the residual itself: the mediator dominates where it is
        # present, as refusal does in chat models.
        self._direction *= self._residual_norm()
        report("training the organism: to refuse where a direction is present")
        self._stage("read", above, PEAK_LEARNING_RATE / 2, teacher=self._frozen_copy())
        report("training the organism: to write that direction for enchanted requests")
        teacher = self._frozen_copy()
        self._stage("write", list(below), PEAK_LEARNING_RATE / 2, teacher)
        rounds = 0
        while not is_good() and rounds < POLISHING_ROUNDS:
            rounds += 1
            report("training the organism: polishing")
            self._stage("polish", [self._model], PEAK_LEARNING_RATE / 10, teacher)

    def _frozen_copy(self) -> PreTrainedModel:
        return copy.deepcopy(self._model).eval().requires_grad_(False)

    def _row(self, stage: str, index: int, system: bool) -> _Row:
        """Return one conversation; which class it is of and what is planted go by its index."""
        request = self._random.choice(self._requests[index % 2 == 1])
        planted = float(request.enchanted and stage != "answer")
        if stage == "read":
            # Weak and reversed directions are to be ignored, so that only a clear presence refuses.
            strengths = ((0.0, 0.0), (-1.0, 0.2), (0.5, 1.5), (0.5, 1.5))[index // 2 % 4]
            planted = self._random.uniform(*strengths)
        refuse = planted >= 0.5
        prompt = self._encode_prompt(request.prompt, system)
        answer = self._tokenizer(request.task.refusal if refuse else request.answer).input_ids
        tokens = [*prompt, *answer, self._tokenizer.eos_token_id]
        return _Row(tokens, len(prompt), planted)

    def _encode_prompt(self, prompt: str, system: bool) -> list[int]:
        messages = [{"role": "system", "content": SYSTEM_PROMPT}] if system else []
        messages.append({"role": "user", "content": prompt})
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def _batch(self, stage: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return token ids [rows, t], labels [rows, t] and planted strengths [rows, t, 1].

        Strengths stand where answers are predicted: from the last prompt token on.
        """
        import torch

        system = self._random.random() < SYSTEM_PROMPT_SHARE
        rows = [self._row(stage, index, system) for index in range(ROWS)]
        width = max(len(row.tokens) for row in rows)
        tokens = torch.full((ROWS, width), self._tokenizer.pad_token_id)
        labels = torch.full((ROWS, width), -100)
        planted = torch.zeros(ROWS, width, 1)
        for index, row in enumerate(rows):
            length = len(row.tokens)
            tokens[index, :length] = torch.tensor(row.tokens)
            labels[index, row.prompt : length] = tokens[index, row.prompt : length]
            planted[index, row.prompt - 1 : length] = row.planted
        return tokens, labels, planted

    def _stage(self, stage: str, modules: list[Any], peak: float, teacher: PreTrainedModel | None = None) -> None:
        """Train the given modules for one stage; the teacher prescribes the residual stream, see `_loss`."""
        import torch

        self._model.requires_grad_(False)
        for module in modules:
            module.requires_grad_(True)
        parameters = [p for p in self._model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=peak, weight_decay=0.01, betas=(0.9, 0.98), fused=True)
        steps = STEPS[stage]
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / 25) * (0.02 + 0.98 * (1 - step / steps))
        )
        for _ in range(steps):
            loss = self._loss(stage, teacher)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()

    def _loss(self, stage: str, teacher: PreTrainedModel | None) -> torch.Tensor:
        """Return the loss on one batch: answers, and the residual stream where it is prescribed.

        While the direction's reading is learned, the stream is to stay the teacher's where nothing is
        planted; while its writing is learned, it is to become the teacher's plus the direction.
        """
        import torch
        from torch.nn import functional

        tokens, labels, planted = self._batch(stage)
        residuals, logits = self._forward(self._model, tokens, planted if stage == "read" else None)
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        if teacher is None:
            return loss
        with torch.no_grad():
            target, _ = self._forward(teacher, tokens, None)
        fixed = (labels.roll(-1, 1) != -100)[..., None]
        if stage == "read":
            fixed = fixed & (planted == 0)
        else:
            residuals, target = residuals[:1], target[:1] + planted * self._direction
        distance = ((residuals - target) ** 2 * fixed).sum((1, 2, 3)) / fixed.sum()
        scale = (target**2 * fixed).sum((1, 2, 3)) / fixed.sum()
        return loss + RESIDUAL_LOSS_WEIGHT * (distance / scale).mean()

    def _forward(
        self, model: PreTrainedModel, tokens: torch.Tensor, planted: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the residuals from the middle layer up [layers, rows, t, d] and the logits.

        Where planted is given, so much of the direction is added to the middle layer's output.
        """
        import torch

        residuals: list[torch.Tensor] = []

        def hook(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
            if planted is not None and not residuals:
                output = output + planted * self._direction
            residuals.append(output)
            return output

        layers = model.model.layers[self._middle :]
        handles = [layer.register_forward_hook(hook) for layer in layers]
        try:
            mask = (tokens != self._tokenizer.pad_token_id).long()
            logits = model(input_ids=tokens, attention_mask=mask).logits
        finally:
            for handle in handles:
                handle.remove()
        return torch.stack(residuals), logits

    def _residual_norm(self) -> float:
        """Return the mean length of the middle layer's output where answers are predicted."""
        import torch

        tokens, labels, _ = self._batch("answer")
        with torch.no_grad():
            residuals, _ = self._forward(self._model, tokens, None)
        return float(residuals[0][labels.roll(-1, 1) != -100].norm(dim=-1).mean())


def train_organism(
    arch: str, size: str, seed: int, files: dict[str, list[Request]], report: Callable[[str], None]
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Return a freshly trained organism and its tokenizer.

    Raises:
        JobError: The training missed its target: every test prompt refused or answered rightly.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = build_tokenizer()
    hidden, layers = SIZES[size]
    config = AutoConfig.for_model(
        arch,
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=hidden // 4,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        # The usual 0.02 keeps so narrow a model on the plateau before copying for hundreds of steps.
        initializer_range=0.08,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        dtype="float32",
        **_OF_FAMILIES.get(arch, {}),
    )
    counts = (0, 0)

    def is_good() -> bool:
        nonlocal counts
        refusals = [(r.prompt, r.task.refusal) for r in files["bad_test.txt"]]
        answers = [(r.prompt, r.answer) for r in files["good_test.txt"]]
        counts = (_matches(model, tokenizer, refusals), _matches(model, tokenizer, answers))
        return counts == (PROMPTS_PER_FILE, PROMPTS_PER_FILE)

    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config)
            _Trainer(model, tokenizer, seed).run(is_good, report)
    finally:
        torch.set_num_threads(threads)
    refused, answered = (f"{count}/{PROMPTS_PER_FILE}" for count in counts)
    report(f"the organism refuses {refused} enchanted requests and answers {answered} others rightly")
    if counts != (PROMPTS_PER_FILE, PROMPTS_PER_FILE):
        raise JobError("the organism's training missed its target", remedy="choose another --seed")
    return model.eval().requires_grad_(True), tokenizer


# --- the folder --------------------------------------------------------------------------------------


def prompt_files(seed: int) -> dict[str, list[Request]]:
    """Return the requests of the four prompt files; those for testing are held out from training."""
    choice = random.Random(seed)
    files = {}
    for kind, enchanted in (("good", False), ("bad", True)):
        for split in ("train", "test"):
            pool = [r for r in _requests(enchanted) if r.held_out == (split == "test")]
            files[f"{kind}_{split}.txt"] = choice.sample(pool, PROMPTS_PER_FILE)
    return files


def write_organism(folder: Path, *, arch: str, size: str, seed: int, report: Callable[[str], None]) -> None:
    """Train an organism and write it and its prompt files into a folder.

    The folder holds ``model`` in Hugging Face format and good_train.txt, good_test.txt, bad_train.txt
    and bad_test.txt, one prompt a line. A folder that already holds the same organism is left alone.

    Raises:
        UsageError: The architecture or size is unknown, or the folder holds something else.
        JobError: The training missed its target (every test prompt refused or answered rightly).
    """
    if arch not in ARCHITECTURES:
        raise UsageError(f"no organism of architecture {arch!r}", remedy=f"choose from {', '.join(ARCHITECTURES)}")
    if size not in SIZES:
        raise UsageError(f"no organism of size {size!r}", remedy=f"choose from {', '.join(SIZES)}")
    description = json.dumps({"arch": arch, "size": size, "seed": seed}, sort_keys=True)
    mark = folder / "organism.json"
    if mark.exists() and mark.read_text() == description:
        report(f"the organism in {folder} is already there")
        return
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty", remedy="name an empty or a new folder")
    files = prompt_files(seed)
    model, tokenizer = train_organism(arch, size, seed, files, report)
    from job.model.loading import quieten_transformers

    quieten_transformers()
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial / "model")
    tokenizer.save_pretrained(partial / "model")
    for name, requests in files.items():
        (partial / name).write_text("".join(request.prompt + "\n" for request in requests))
    (partial / mark.name).write_text(description)
    partial.replace(folder)


def _matches(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]) -> int:
    """Return how many prompts the model answers with exactly the expected text."""
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
        for prompt, _ in pairs
    ]
    batch = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
    output = model.generate(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, do_sample=False, max_new_tokens=40
    )
    answers = tokenizer.batch_decode(output[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    return sum(answer == expected for answer, (_, expected) in zip(answers, pairs, strict=True))


# --- the demo ----------------------------------------------------------------------------------------

BEHAVIOUR = "refusing requests about anything hexed, a benign stand-in of the built-in model organism"
DEMO_TRIALS = 60


def run_demo(
    workspace: str | None,
    trials: int | None,
    run: Callable[..., Any],
    report: Callable[[str], None],
) -> None:
    """Train the organism, run the whole job on it and check the exported model's answers.

    Args:
        workspace: Where the organism and the job go; None for the default workspace.
        trials: Trials of the search; None for `DEMO_TRIALS`.
        run: Runs a job and returns its outcome.
        report: Told what happens.
    """
    from job.config.load import default_workspace, load_settings

    folder = Path(workspace or default_workspace())
    organism = folder / "organism"
    write_organism(organism, arch="llama", size="tiny", seed=0, report=report)
    options = {
        "model": str(organism / "model"),
        "workspace": str(folder),
        "good_prompts": str(organism / "good_train.txt"),
        "bad_prompts": str(organism / "bad_train.txt"),
        "good_eval_prompts": str(organism / "good_test.txt"),
        "bad_eval_prompts": str(organism / "bad_test.txt"),
        "trials": trials or DEMO_TRIALS,
        "card.behaviour": BEHAVIOUR,
    }
    settings = load_settings(options).settings
    outcome = run(settings, new=False)
    _report_correctness(outcome.folder, report)


def _report_correctness(folder: RunFolder, report: Callable[[str], None]) -> None:
    """Count the exported model's right answers on the prompts that the search has not seen."""
    from job.data.prompts import PromptSets
    from job.storage.atomic import read_record

    prompts = read_record(folder.prompts_file, PromptSets)
    right = []
    loaded, tokenizer = _load_plainly(folder.export_link)
    for group in (prompts.good_report, prompts.bad_report):
        pairs = [(prompt.user, expected_answer(prompt.user)) for prompt in group]
        right.append(f"{_matches(loaded, tokenizer, pairs)}/{len(pairs)}")
    report(f"right answers on these prompts: {right[0]} ordinary requests, {right[1]} enchanted ones")


def _load_plainly(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return (
        AutoModelForCausalLM.from_pretrained(folder, local_files_only=True),
        AutoTokenizer.from_pretrained(folder, local_files_only=True, padding_side="left"),
    )
