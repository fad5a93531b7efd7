"""Every option of a run: frozen, nested, validated, and free of heavy imports.

``None`` means "not given": :func:`oatlite.config.load.resolve` fills it from the hardware and the other values,
so that the ``config.toml`` of a run holds no ``None`` whose meaning could drift.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from oatlite.config.algorithms import AlgorithmConfig, SimPOConfig
from oatlite.config.section import Probability, Section, VariableName

PROMPT = "{prompt}"
"""Where the prompt goes in ``data.prompt_template``."""
MAX_PROCESSES = 1024
MAX_PER_STEP = 100_000
"""Prompts or pairs; what is made for each of them must fit into memory, and into a message."""
MAX_PAIRS = 4096
"""Of a request to a server."""
DTypeName = Literal["auto", "float32", "bfloat16", "float16"]


def _names(value: object) -> object:
    """A single name stands for a list of one, and nothing for none."""
    if isinstance(value, str):
        return (value,) if value else ()
    return tuple(value) if isinstance(value, list) else value


def _numbers(value: object) -> object:
    """``0.7,0.3``, as it is typed on a command line."""
    if not isinstance(value, str):
        return tuple(value) if isinstance(value, list) else value
    try:
        return tuple(float(part) for part in value.split(",") if part.strip())
    except ValueError:
        raise ValueError("must be numbers with commas between them, as in 0.7,0.3") from None


PerStep = Annotated[int, Field(gt=0, le=MAX_PER_STEP)]
NumProcesses = Annotated[int, Field(le=MAX_PROCESSES)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
Names = Annotated[tuple[str, ...], BeforeValidator(_names)]
Numbers = Annotated[tuple[float, ...], BeforeValidator(_numbers)]


class RunConfig(Section):
    name: str | None = Field(None, description="folder of this run under run.dir; default: algorithm and time")
    dir: str = Field("runs", description="where run folders are made")
    seed: NonNegativeInt = Field(0, description="the one seed of the run")
    ui: Literal["auto", "live", "plain"] = Field("auto", description="live screen, plain lines, or by terminal")
    wandb: bool = Field(False, description="log to Weights & Biases too (WANDB_MODE=offline keeps it on disk)")
    wandb_project: str = Field("oatlite", description="project at Weights & Biases")


class ModelConfig(Section):
    path: str | None = Field(None, description="policy: a folder, a hub id, or demo")
    reference: str | None = Field(None, description="reference policy; default: the initial policy")
    dtype: DTypeName = Field("auto", description="auto: bfloat16 on a GPU, float32 on a CPU")
    trust_remote_code: bool = Field(False, description="run code that comes with a model, a reward model too")


class DataConfig(Section):
    prompts: str | None = Field(
        None, description="dataset: a hub id, a saved one, a .jsonl .json .csv .parquet file, or demo"
    )
    preferences: str | None = Field(
        None, description="dataset of pairs, prompt, chosen and rejected, for --offline; a name as of prompts"
    )
    split: str = Field("train", description="split that training prompts come from")
    eval_split: str | None = Field(None, description="split for evaluation; default: held out of split")
    prompt_key: str = Field("prompt", description="column that holds the prompt")
    reference_key: str | None = Field("reference", description="column of answers that evaluation compares against")
    chosen_key: str = Field("chosen", description="offline: column of the better answer")
    rejected_key: str = Field("rejected", description="offline: column of the worse answer")
    margin_key: str | None = Field(
        None, description="offline: column of the better answer's reward minus the worse one's, for kl and rev_kl"
    )
    chat_template: bool = Field(False, description="wrap each prompt in the policy's chat template")
    prompt_template: str | None = Field(
        None,
        description="text around each prompt, with {prompt} in its place, for a model without a chat template; of a "
        "conversation its first message",
    )
    max_prompt_tokens: PositiveInt = Field(512, description="longer prompts are dropped, and counted")
    max_response_tokens: PositiveInt = Field(
        1024, description="offline: pairs with a longer answer are dropped, and counted"
    )
    max_prompts: PositiveInt | None = Field(None, description="prompts per epoch; default: all")
    epochs: PositiveInt = Field(1, description="passes over the prompts")
    max_queries: PositiveInt | None = Field(
        None,
        description="stop after so many oracle queries of training, those of evaluation not counted; default: one for "
        "each prompt of each epoch",
    )


class SamplingConfig(Section):
    max_new_tokens: PositiveInt = Field(53, description="longest response, in tokens")
    temperature: PositiveFloat = Field(0.7, description="temperature of sampled responses")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="1: off")
    top_k: NonNegativeInt = Field(0, description="0: off")
    mixture_weight: PositiveFloat = Field(
        0.5, description="w of --sampler mixture: (1 + w) log pi - w log pi_ref, and (1 - w) log pi + w log pi_ref"
    )


class RolloutConfig(Section):
    sampler: Literal["policy", "reference", "hybrid", "mixture"] = Field(
        "policy",
        description="where a prompt's two responses come from: both from the policy, both from the reference, one from "
        "each, or from two mixtures of both",
    )
    policy_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description="with another --sampler than policy: share of prompts all of whose responses are the policy's",
    )
    prompts_per_step: PerStep = Field(128, description="prompts of one step over all ranks")
    sync_every: PositiveInt = Field(1, description="steps between weight syncs; larger than the run: offline baseline")
    asynchronous: bool = Field(
        False, description="sample the steps to come while the learner is at work, each with processes of its own"
    )
    max_staleness: PositiveInt = Field(
        1, description="with --async: policy versions that may lie between a sample and the step that trains on it"
    )
    strict_staleness: bool = Field(
        False,
        description="with --async: each sample is as stale as it may be, so that a run of one seed repeats itself",
    )
    offline: bool = Field(
        False, description="no rollouts: train on the pairs of --preferences, without actor or oracle"
    )


class LearnerConfig(Section):
    batch_size: PerStep | None = Field(None, description="pairs per gradient step, all ranks; default: a whole step")
    micro_batch_size: PerStep = Field(8, description="pairs per forward pass and rank")
    passes: PositiveInt = Field(1, description="passes over the buffered pairs, each step")
    buffer_size: PositiveInt | None = Field(
        None, description="newest pairs kept to train on, all ranks; default: one step's, so that none comes back"
    )
    buffer_clear_every: PositiveInt | None = Field(None, description="steps between clearings of the buffer")
    max_gradient_steps: PositiveInt | None = Field(None, description="gradient steps of one step, at most")
    lr: PositiveFloat = Field(5e-7, description="peak learning rate")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="cosine has a floor of 0.1")
    warmup_ratio: Probability = Field(0.03, description="share of the schedule that warms up")
    weight_decay: NonNegativeFloat = 0.0
    adam_betas: tuple[Probability, Probability] = (0.9, 0.95)
    adam_eps: PositiveFloat = 1e-8
    max_grad_norm: NonNegativeFloat = Field(1.0, description="0: no clipping")
    zero_stage: Literal[0, 1, 2, 3] | None = Field(
        None, description="default: 2 with several ranks or in bfloat16, else 0"
    )
    gradient_checkpointing: bool = Field(False, description="less memory, a third more time")
    aux_loss_coef: NonNegativeFloat = Field(
        0.0, description="weight of the routers' load-balancing loss, for a mixture of experts"
    )
    optimizer_offload: bool = Field(
        False, description="keep the optimizer's state in host memory, and step there; needs zero_stage 1, 2 or 3"
    )
    parameter_offload: bool = Field(
        False, description="keep weights in host memory until a layer needs them; needs zero_stage 3"
    )
    reference_offload: bool = Field(
        False, description="keep the reference model in host memory while it is not asked; less GPU memory, slower"
    )
    importance_cap: PositiveFloat | None = Field(
        None,
        description="weight each pair by how much likelier the newest policy is to sample it than the one that did, "
        "up to this; default: each counts once",
    )
    log_kl: bool = Field(False, description="keep a reference model for the KL metric when the loss needs none")


class OracleConfig(Section):
    path: Names = Field(
        (),
        description="reward model (folder or hub id), pairrm, file.py:function, remote, judge, or demo; several: their "
        "rewards are added",
    )
    weights: Numbers = Field((), description="of several oracles, as in 0.7,0.3; default: 1 each")
    chat_template: bool | None = Field(
        None,
        description="wrap prompt and response in the reward model's chat template; default: no, which is said where it "
        "has one",
    )
    max_tokens: PositiveInt | None = Field(
        None,
        description="prompt and response (of pairrm: both) together; longer pairs carry no weight; default: 1024, of "
        "pairrm 2048",
    )
    batch_tokens: PositiveInt = Field(8192, description="padded tokens per oracle forward pass")
    dtype: DTypeName = "auto"
    feedback: Literal["threshold", "bernoulli"] = Field(
        "threshold", description="the verdict is the likelier side, or drawn from the win probability"
    )
    flip_prob: Probability = Field(0.0, description="label noise: share of verdicts that are turned around")


class RemoteConfig(Section):
    """A reward model or another oracle behind ``oatlite serve-oracle``, or oat's server."""

    url: str | None = Field(None, description="server of --oracle remote, as in http://127.0.0.1:8000")
    batch_size: Annotated[int, Field(gt=0, le=MAX_PAIRS)] = Field(32, description="pairs per request")
    concurrency: PositiveInt = Field(4, description="requests at once, of each actor")
    timeout_s: PositiveFloat = Field(60, description="one request may take so long; then it is asked again")
    max_answer_mib: PositiveInt = Field(16, description="a longer answer is refused")
    token_env: VariableName = Field(
        "OATLITE_ORACLE_TOKEN", description="environment variable with the server's token, if it wants one"
    )


class JudgeConfig(Section):
    """A language model that is asked which response is better, behind an OpenAI-compatible endpoint."""

    model: str | None = Field(None, description="name of the judge at its endpoint, for --oracle judge")
    url: str = Field("https://api.openai.com/v1", description="OpenAI-compatible endpoint of --oracle judge")
    key_env: VariableName = Field("OPENAI_API_KEY", description="environment variable with the endpoint's key")
    template: str = Field(
        "general",
        description="what the judge is asked: general, for the better reply to a request, summaries, for the better "
        "summary of a post, or a file of yours",
    )
    max_tokens: PositiveInt = Field(
        1, description="tokens that the judge may write; with more than one, its verdict is the last word"
    )
    order: Literal["both", "random"] = Field(
        "both", description="ask in both orders and take the mean, or in one at random for half the price"
    )
    concurrency: PositiveInt = Field(8, description="requests at once, of each actor")
    timeout_s: PositiveFloat = Field(60, description="one request may take so long; then it is asked again")


class ExploreConfig(Section):
    """Which two of several candidates go to the oracle, by a reward head that knows what it does not know (SEA,
    arXiv 2411.01493)."""

    rule: Literal["none", "sea-bai", "sea-ee", "uncertainty", "passive", "apl"] = Field(
        "none", description="which two of several candidates the oracle compares; none: the algorithm says"
    )
    num_candidates: Annotated[int, Field(ge=2)] = Field(10, description="responses per prompt to choose two from")
    encoder: str | None = Field(
        None, description="model whose features the head reads; default: the oracle's own, if it is one"
    )
    uncertainty: Literal["preference", "logits", "disagreement"] = Field(
        "preference",
        description="sea-bai, uncertainty: what the head's members differ in, their probabilities of the verdict, "
        "their differences of rewards, or what the verdict would tell about them",
    )
    random_fallback: bool = Field(
        True, description="a second choice equal to the first becomes a random other; else the prompt is left out"
    )
    allow_second_best: bool = Field(False, description="sea-ee: a member's second best may be the second choice")
    max_tries: PositiveInt | None = Field(
        None, description="sea-ee: members asked, that of the first choice counted in; default: all"
    )
    head_only: bool = Field(False, description="only the head learns, and the policy stays (EE4LLM, arXiv 2402.00396)")
    entropy_share: PositiveShare = Field(
        0.5, description="apl: share of the prompts that is kept, those whose responses are the least likely"
    )
    certainty_share: PositiveShare = Field(
        1.0, description="apl: share of the pairs that is kept, those that the implicit reward tells apart the most"
    )
    self_label_ratio: Probability = Field(
        0.0, description="share of prompts whose pair a member of the head labels itself, at no query"
    )
    burn_in: NonNegativeInt = Field(5, description="steps before the head labels pairs itself")
    members: PositiveInt = Field(20, description="networks in the head")
    hidden_size: PositiveInt = Field(128, description="width of each")
    lr: PositiveFloat = Field(1e-3, description="the head's learning rate (Adam)")
    weight_decay: NonNegativeFloat = 5e-5
    gradient_steps: PositiveInt = Field(5, description="the head's gradient steps, each step")
    batch_size: PositiveInt = Field(128, description="comparisons of one of them")
    pull: NonNegativeFloat = Field(
        0.5, description="weight of the pull toward the head's initialization; it falls with the queries made"
    )
    fixed_pull: bool = Field(False, description="the pull does not fall")
    buffer_size: PositiveInt = Field(50_000, description="newest comparisons that the head learns from")
    learn_until: PositiveInt | None = Field(None, description="queries after which the head stops learning")


class EvalConfig(Section):
    every: PositiveInt = Field(20, description="steps between evaluations; both ends are always evaluated")
    every_queries: PositiveInt | None = Field(
        None, description="oracle queries between evaluations, in place of eval.every"
    )
    oracle: Names = Field((), description="judges evaluations instead of --oracle; the same kinds of names")
    weights: Numbers = Field((), description="of several oracles of evaluation; default: 1 each")
    chat_template: bool | None = Field(None, description="of the oracle of evaluation; default: oracle.chat_template")
    max_tokens: PositiveInt | None = Field(None, description="of the oracle of evaluation; default: oracle.max_tokens")
    url: str | None = Field(None, description="server of --eval-oracle remote; default: remote.url")
    token_env: VariableName | None = Field(
        None, description="environment variable with that server's token; default, at the same host: remote.token_env"
    )
    judge_model: str | None = Field(None, description="judge of --eval-oracle judge; default: judge.model")
    judge_url: str | None = Field(None, description="endpoint of that judge; default: judge.url")
    judge_key_env: VariableName | None = Field(
        None, description="environment variable with that judge's key; default, at the same host: judge.key_env"
    )
    best_of_n: PositiveInt = Field(
        1, description="evaluate the best of so many samples, picked by --oracle, and not the greedy response"
    )
    best_of_n_temperature: PositiveFloat = Field(0.7, description="temperature of those samples")
    online: bool = Field(
        False, description="judge the training responses against the dataset's answers too, at each step"
    )
    prompts: NonNegativeInt = Field(200, description="held-out prompts, offline held-out pairs; 0: no evaluation")
    gold_score: str | None = Field(
        None, description="file.py:function(prompt, response) -> float, logged beside the oracle and never trained on"
    )


class LoraConfig(Section):
    """A low-rank adapter that is trained instead of the weights."""

    rank: NonNegativeInt = Field(0, description="train an adapter of this rank (LoRA); 0: train all weights")
    alpha: PositiveInt | None = Field(None, description="the adapter counts alpha / rank; default: twice the rank")
    targets: tuple[str, ...] = Field(
        (), description='layers by the end of their names, as in ["q_proj", "v_proj"]; none: all linear ones'
    )
    quantize: Literal["none", "nf4"] = Field(
        "none", description="nf4: keep the frozen weights in 4 bits (QLoRA, arXiv 2305.14314); on GPUs only"
    )
    sync: Literal["merged", "adapter"] = Field(
        "merged", description="send whole weights with the adapter in them, or the adapter alone"
    )


class CheckpointConfig(Section):
    save_every: PositiveInt = Field(50, description="steps between checkpoints, from which a stopped run resumes")
    keep_last: PositiveInt = Field(1, description="checkpoints kept; there is room needed for one more")


class PlacementConfig(Section):
    gpus: NonNegativeInt | None = Field(None, description="GPUs to use; default: all there are; 0: the CPU")
    actors: Annotated[NumProcesses, Field(ge=0)] | None = Field(
        None, description="actor processes; default: as many as have GPUs, or one"
    )
    learners: Annotated[NumProcesses, Field(gt=0)] | None = Field(
        None, description="learner ranks; default: one per GPU, or one"
    )
    gpus_per_actor: Annotated[NumProcesses, Field(gt=0)] = Field(
        1, description="GPUs that an actor's engine is cut up over (tensor parallelism); on the CPU, processes"
    )
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="vLLM's share of a GPU; default: computed from the GPU and the models, and not kept"
    )
    sleep: bool | None = Field(
        None,
        description="vLLM gives up its memory while the learner learns; default: where each actor shares its learner's "
        "GPU",
    )
    kv_cache_gib: PositiveFloat = Field(1.0, description="vLLM's cache on CPU")


class SyncConfig(Section):
    transport: Literal["auto", "shm", "cuda_ipc"] = "auto"
    bucket_mib: PositiveInt = Field(256, description="size of the shared buffer")


class TimeoutConfig(Section):
    """Seconds. What takes longer ends the run with exit code 7, but for an oracle (6), an actor that is silent (at most
    three times it is started again) and a step that SIGTERM waits for (143, and nothing of it is saved)."""

    start_s: PositiveFloat = Field(900, description="for models, which may have to be downloaded first, and an engine")
    generate_s: PositiveFloat = 900
    oracle_s: PositiveFloat = 300
    learn_s: PositiveFloat = 1800
    sync_s: PositiveFloat = 300
    stop_s: PositiveFloat = Field(300, description="for the step and the checkpoint that SIGTERM waits for")
    silence_s: PositiveFloat = Field(
        60, description="a process that gives no sign of life for longer, from its start on, is dead"
    )


class Config(Section):
    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    sampling: SamplingConfig = SamplingConfig()
    rollout: RolloutConfig = RolloutConfig()
    learner: LearnerConfig = LearnerConfig()
    lora: LoraConfig = LoraConfig()
    algorithm: AlgorithmConfig = SimPOConfig()
    oracle: OracleConfig = OracleConfig()
    remote: RemoteConfig = RemoteConfig()
    judge: JudgeConfig = JudgeConfig()
    explore: ExploreConfig = ExploreConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    placement: PlacementConfig = PlacementConfig()
    sync: SyncConfig = SyncConfig()
    timeouts: TimeoutConfig = TimeoutConfig()
