"""What other tools call our values, and the values that are to come."""

from __future__ import annotations

from dataclasses import dataclass

from tunesmith.recipe.names import by_name, plain

ROADMAP = {
    "optim.name": {"lion", "adafactor_8bit", "muon", "lamb", "schedule_free"},
    "schedule.lr_scheduler_type": {"inverse_sqrt", "rex"},
    "parallel.strategy": {"zero1", "zero2", "zero3", "fsdp2"},
    "training.precision": {"fp8"},
    "objective.type": {"dpo", "orpo", "kto", "grpo", "reward", "ppo", "distillation", "embedding", "asr",
                       "image_classification"},
    "model.quantization.type": {"gptq", "awq", "hqq", "aqlm", "eetq", "fp8", "mxfp4", "quanto", "torchao"},
}  # fmt: skip
"""Values which this version may not have: they are told apart from mistakes. One that has arrived needs no
change here: what the models accept is no fault."""

_VALUES = {
    "optim.name": {
        "adamw": """adamw_torch adamw_torch_fused adamw_torch_xla adamw_torch_npu_fused adamw_hf
            adamw_apex_fused adamw_anyprecision torch.optim.adamw fusedadam deepspeedcpuadam paged_adamw
            paged_adamw_32bit""",
        "adamw_8bit": """adamw_bnb_8bit paged_adamw_8bit adamw8bit pagedadamw8bit bitsandbytes.optim.adamw8bit
            bitsandbytes.optim.pagedadamw8bit adamw_torch_8bit ao_adamw_8bit""",
        "lion_8bit": "paged_lion_8bit lion8bit lion_bnb_8bit",
        "lion": "lion_32bit paged_lion_32bit",
        "adam": "torch.optim.adam",
        "sgd": "torch.optim.sgd momentum",
        "rmsprop": "rmsprop_bnb rmsprop_torch",
    },
    "schedule.lr_scheduler_type": {
        "constant": "constant_with_warmup none fixed",
        "linear": "linear_with_warmup linearlr warmupdecaylr linear_decay",
        "cosine": """cosine_annealing cosineannealinglr cosine_with_min_lr cosine_warmup_with_min_lr
            cosine_schedule_with_warmup cosine_with_warmup""",
        "cosine_with_restarts": "cosine_warm_restarts cosineannealingwarmrestarts",
        "polynomial": "poly polynomial_decay polynomiallr",
        "exponential": "exponentiallr",
        "step": "steplr step_lr multistep",
        "cyclic": "cycliclr triangular",
        "one_cycle": "onecycle onecyclelr 1cycle",
        "wsd": "warmup_stable_decay trapezoidal",
        "reduce_on_plateau": "reduce_lr_on_plateau reducelronplateau plateau",
    },
    "training.precision": {
        "bf16": "bfloat16 torch.bfloat16 bf16-mixed bf16_mixed",
        "fp16": "float16 torch.float16 half 16 16-mixed fp16-mixed",
        "fp32": "float32 torch.float32 full float 32 32-true no none",
    },
    "parallel.strategy": {
        "ddp": "dp distributed multi_gpu data_parallel distributed_data_parallel",
        "single": "none no single_gpu cpu",
        "zero1": "deepspeed_zero1 deepspeed_stage_1 zero_1 zero-1",
        "zero2": "deepspeed_zero2 deepspeed_stage_2 zero_2 zero-2 deepspeed zero",
        "zero3": "deepspeed_zero3 deepspeed_stage_3 zero_3 zero-3",
        "fsdp2": "fsdp fsdp1 full_shard fully_sharded",
    },
    "objective.type": {
        "classification": """sequence_classification text_classification seq_cls text_cls sentiment
            sentiment_analysis single_label multi_label multi_label_classification regression
            sentence_classification nli""",
        "token_classification": "ner pos tagging chunking sequence_labeling named_entity_recognition",
        "question_answering": "qa squad extractive_qa extractive_question_answering",
        "seq2seq": "translation summarization summarisation text2text_generation seq2seq_lm seq_2_seq_lm",
        "causal_lm": "clm pt pretrain pretraining lm language_modeling text_generation completion",
        "masked_lm": "mlm fill_mask",
        "span_corruption": "t5 denoising ul2",
        "sft": "instruct instruction instruction_tuning chat supervised finetune fine_tuning",
        "reward": "rm reward_model",
        "embedding": "sentence_embedding feature_extraction",
        "asr": "automatic_speech_recognition speech",
    },
    "objective.loss.type": {
        "cross_entropy": """ce nll crossentropy crossentropyloss cross_entropy_loss softmax
            categorical_crossentropy""",
        "binary_cross_entropy": "bce bce_with_logits bcewithlogitsloss binary_crossentropy sigmoid",
        "mean_squared_error": "mse l2 mse_loss mseloss",
        "mean_absolute_error": "mae l1 l1_loss l1loss",
        "huber": "smooth_l1 smoothl1 smooth_l1_loss huber_loss huberloss",
        "focal": "focal_loss focalloss",
        "class_balanced": "cb cb_loss class_balanced_loss effective_number",
        "ldam": "ldam_loss ldam_drw ldam-drw",
        "ordinal": "ordinal_regression coral corn coral_loss corn_loss emd",
        "ranking": "ranknet listnet listmle margin_ranking marginrankingloss pairwise listwise",
        "dice": "dice_loss diceloss dsc self_adjusting_dice",
        "function": "custom user callable python",
    },
    "data.train.format": {
        "messages": "chat_template chatml openai chat chat_ml conversational",
        "sharegpt": "conversations",
        "alpaca": "instruction instruct",
        "text": "completion pretrain plain plain_text raw",
        "prompt_answer": "prompt_completion prompt_response input_output query_response qa",
        "tokens": "conll ner bio iob",
        "translation": "seq2seq summarization source_target",
        "pairs": "sentence_pairs text_pair nli",
        "classification": "text_classification labelled",
        "squad": "question_answering",
    },
    "model.attn_implementation": {
        "flash_attention_2": "flash flash_attn fa2 flash_attention flash_attn_2",
        "flash_attention_3": "fa3 flash_attn_3",
        "flex_attention": "flex",
        "eager": "none math",
        "sdpa": "auto sdp torch",
    },
    "model.quantization.type": {
        "nf4": "4bit 4_bit bnb_4bit load_in_4bit int4 4 qlora",
        "int8": "8bit 8_bit bnb_8bit load_in_8bit llm.int8 llm_int8 8",
    },
    "model.quantization.compute_dtype": {
        "bf16": "bfloat16 torch.bfloat16",
        "fp16": "float16 torch.float16 half",
        "fp32": "float32 torch.float32 float",
    },
    "trainable.adapters.type": {
        "ia3": "(ia)3 ia_3 (ia)^3",
        "prompt_tuning": "prompt soft_prompt soft_prompts prompttuning",
        "prefix_tuning": "prefix prefixtuning",
        "p_tuning": "ptuning p_tuning_v1",
        "existing": "resume continue pretrained",
    },
    "trainable.head.pooling": {
        "cls": "first first_token cls_token bos",
        "mean": "avg average mean_pooling",
        "max": "max_pooling",
        "last": "last_token eos eos_token",
        "attention": "attn attentive weighted",
    },
    "trainable.head.activation": {"silu": "swish"},
    "model.init": {"from_config": "random scratch from_scratch", "pretrained": "from_pretrained"},
    "data.truncation": {"cut": "right truncate true", "drop": "delete raise discard"},
    "kernels": {"auto": "true on triton fused liger", "reference": "false off none torch"},
    "tracking.wandb.mode": {"online": "true on", "disabled": "false off none", "offline": "dryrun"},
    "tracking.progress": {"bar": "tqdm true", "off": "false none"},
    "checkpoint.final": {"best": "true", "last": "latest false"},
}

VALUES = {
    path: {plain(value): ours for value, ours in by_name(table).items()} for path, table in _VALUES.items()
}
"""Setting → what others call its values (in `plain` form) → ours."""


@dataclass(frozen=True, slots=True)
class Phrase:
    """What takes more than a word here: the tag that is meant, if any, and all that is to be written."""

    tag: str | None
    text: str


_LORA_WITH = {
    "use_dora: true": "dora",
    "use_rslora: true": "rslora rs_lora",
    "loraplus_lr_ratio: 16": "lora+ loraplus lora_plus",
    "init_lora_weights: pissa": "pissa",
    "init_lora_weights: olora": "olora",
    "init_lora_weights: loftq": "loftq",
}
_OTHER_PEFT = """adamss boft beft lily loha lokr oft ln_tuning vera frod pvera fourierft glora hra vblora
    unilora miss randlora road hira shira c3a waveft osf delora gralora tinylora psoft"""

PHRASES: dict[str, dict[str, Phrase]] = {
    "trainable.unfreeze": {
        name: Phrase(None, "{every: 1 epoch}")
        for name in ("gradual", "gradually", "progressive", "chain_thaw")
    },
    "trainable.adapters.type": {
        "qlora": Phrase("lora", "{type: lora}, with model.quantization: nf4"),
        **{
            name: Phrase("lora", f"{{type: lora, {setting}}}")
            for name, setting in by_name(_LORA_WITH).items()
        },
        **{name: Phrase(None, f"{{type: peft, peft_type: {name.upper()}}}") for name in _OTHER_PEFT.split()},
    },
}
"""Setting → what others call its values (in `plain` form), where ours is more than a word."""

FILE_KINDS = {"csv", "tsv", "json", "jsonl", "parquet", "txt", "arrow", "xlsx"}
"""What is often given as `format` of a source, which says what a row holds, not how the file is written."""

WORD_FOR_SECTION = {"model.quantization", "objective.loss"}
"""Tagged unions that take the tag alone, in place of the section."""

SHORT = {
    "trainable.adapters": "type",
    "model": "model_name_or_path",
    "objective": "type",
    "optim": "name",
    "schedule": "lr_scheduler_type",
    "parallel": "strategy",
    "training": "precision",
    "tracking.wandb": "mode",
    "data.train": "path",
    "data.eval": "path",
    "data.test": "path",
}
"""The key that a single word given in place of a whole section is meant for."""
