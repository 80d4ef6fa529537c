"""What other tools call our settings and values. Names of axolotl, LLaMA-Factory, ms-swift, TRL, torchtune,
Unsloth, PyTorch Lightning, DeepSpeed and transformers' TrainingArguments (those that its version 5 removed
too). None of them is accepted: each is an error that names ours.

A name with a dot is meant in that section only, one with a leading dot at the top level only, any other one
wherever it stands."""

from __future__ import annotations

_LORA = "trainable.adapters: [{type: lora, r: 16, lora_alpha: 32, target_modules: all-linear}]"

# ours, as the user would write it: what others call it
_OURS = {
    "model.model_name_or_path": """base_model base_model_name_or_path model_name model_id model_path
        model_id_or_path pretrained_model pretrained_model_name_or_path pretrained_model_path backbone
        model.name model.path model.id model.pretrained""",
    "model.config": "model_config overrides_of_model_config model_kwargs config_overrides",
    "model.config: {model_type: …}": "model_type architecture arch",
    "model.revision": "model_revision revision_of_model base_model_revision",
    "model.tokenizer": "tokenizer_name tokenizer_name_or_path tokenizer_path tokenizer_config",
    "model.add_tokens": "new_tokens added_tokens additional_tokens new_special_tokens resize_vocab tokens",
    "model.chat_template": "template chat_template_path chat_template_jinja",
    "model.attn_implementation": """attn_impl flash_attn flash_attention use_flash_attention
        use_flash_attn use_flash_attention_2 flash_attention_2 sdp_attention xformers_attention
        eager_attention flex_attention attention_implementation _attn_implementation attention""",
    "model.gradient_checkpointing": """activation_checkpointing enable_activation_checkpointing
        use_gradient_checkpointing grad_checkpointing disable_gradient_checkpointing""",
    "model.quantization: {type: nf4}": """load_in_4bit quantization_bit quantization_config quant_bits
        quant_method quantize bits bnb_4bit_quant_type bnb_config_kwargs quant_type""",
    "model.quantization: {type: int8}": "load_in_8bit",
    "model.quantization.compute_dtype": "bnb_4bit_compute_dtype quant_compute_dtype",
    "model.quantization.double_quant": """double_quantization bnb_4bit_use_double_quant use_double_quant
        use_nested_quant""",
    "model.quantization.threshold": "llm_int8_threshold",
    "model.quantization.skip_modules": "llm_int8_skip_modules modules_to_not_convert",
    "model.neftune_noise_alpha": "noisy_embedding_alpha neftune_alpha neftune neft_alpha use_neft neftune_noise",
    "model.drop_path": """drop_path_rate stochastic_depth stochastic_depth_prob layerdrop layer_drop
        encoder_layerdrop decoder_layerdrop""",
    "model.dropout": """hidden_dropout hidden_dropout_prob attention_dropout attn_dropout attn_pdrop
        attention_probs_dropout_prob classifier_dropout dropout_rate""",
    "model.init: from_config": "train_from_scratch from_scratch random_init random_init_weights",
    "distill.teacher_model_name_or_path": """teacher_model .teacher_model_name_or_path kd_model_name teacher
        teacher_model_path teacher_name_or_path""",
    "distill.alpha": "sft_alpha kd_ce_alpha student_loss_weight task_loss_weight",
    "distill.alpha: 1 − kd_ratio": "kd_ratio kd_alpha distill_loss_weight",
    "distill.temperature": "kd_temperature distillation_temperature",
    "distill.on_policy: {lmbda: 0.5}": ".lmbda distill.lmbda",
    "distill.sequence_level": "seq_kd",
    "distill.losses: [{type: logits, divergence: jsd, beta: 0.5}]": "distill.beta gkd_beta kd_beta",
    "distill.offline: {top_k: 32}": "gkd_logits_topk kd_top_k_before_softmax logprobs_field",
    "data.train": """dataset datasets dataset_name dataset_path dataset_dir train_file train_files train_data
        train_dataset train_datasets train_path data_path data_dir data_files .train data.training""",
    "data.eval": """eval_dataset eval_datasets eval_file eval_data validation validation_file
        validation_dataset valid_file valid_dataset val_file val_data val_dataset dev_file dev_dataset
        test_datasets .eval data.valid data.val data.dev""",
    "data.test": "test_file test_dataset test_data .test",
    "data.split: {eval: 0.1}": """val_set_size val_size val_split val_ratio validation_split
        validation_split_percentage split_dataset_ratio eval_split_ratio train_test_split test_size""",
    "data.split.stratify": "stratify_by_column stratify_by",
    "data.max_length": """sequence_len sequence_length cutoff_len max_seq_length max_seq_len
        max_sequence_length max_len seq_length seq_len model_max_length block_size context_length
        max_source_length max_input_length n_ctx""",
    "data.packing": "sample_packing neat_packing packed pack_dataset use_packing eval_sample_packing",
    "data.truncation": "truncation_strategy truncation_mode truncation_side excess_length_strategy",
    "data.group_by_length": "train_sampling_strategy length_grouping length_grouped",
    "data.sampling: {type: balanced}": """balanced_sampling class_balanced_sampling weighted_random_sampler
        weighted_sampler imbalanced_sampler balance_classes""",
    "data.sampling: {type: oversample}": "oversampling random_oversampling minority_oversampling",
    "data.sampling: {type: undersample}": "undersampling random_undersampling",
    "data.curriculum: {by: length}": "curriculum_learning curriculum_sampling curriculum_type",
    "data.max_length_schedule": "sequence_length_warmup seqlen_warmup seq_len_schedule",
    "data.shuffle": """shuffle_dataset dataset_shuffle train_dataloader_shuffle disable_shuffling
        shuffle_merged_datasets""",
    "data.augment: [{type: token_drop, fraction: 0.1}]": "augmentation augmentations data_augmentation .augment",
    "data.augment: [{type: mixup, alpha: 0.2}]": "mixup mixup_alpha",
    "data.cache_dir": "dataset_prepared_path tokenized_path dataset_cache_dir preprocessed_path",
    "data.train.path": "data.train.file data.train.file_name data.train.dataset data.train.url",
    "data.train.format": "data.train.type data.train.formatting prompt_strategy dataset_format dataset_type",
    "data.train.columns: {…}": """column_mapping text_column text_field dataset_text_field label_column
        label_field target_column prompt_column response_column summary_column field_messages
        field_instruction field_output message_property_mappings remap_columns data.train.text
        data.train.label data.train.messages""",
    "data.train.split": "train_split dataset_split train_on_split",
    "data.train.weight": "interleave_probs sampling_weight sampling_probability dataset_weight mix_ratio",
    "data.train.limit": "max_samples max_train_samples num_samples data.train.sample",
    "data.eval.limit": "max_eval_samples max_val_samples limit_val_batches",
    "data.train.delimiter": "separator data.train.sep csv_separator",
    "objective.type": """stage task task_type rlhf_type trainer_type training_type objective.name
        objective.task .type rl""",
    "objective.loss": """.loss loss_type loss_function loss_fn loss_func loss_name criterion custom_loss
        custom_loss_function""",
    "objective.loss: focal": "focal_loss use_focal_loss objective.loss.focal",
    "objective.loss: {type: focal, gamma: 2.0}": """focal_gamma focal_loss_gamma gamma_focal
        objective.loss.focal_gamma""",
    "objective.loss: {type: focal, alpha: auto}": "focal_alpha focal_loss_alpha objective.loss.focal_alpha",
    "objective.loss: {type: cross_entropy, class_weights: auto}": """class_weight class_weighting
        balanced_class_weights use_class_weights weighted_loss weighted_cross_entropy""",
    "objective.loss.class_weights": "objective.loss.weight objective.loss.weights objective.loss.class_weight",
    "objective.loss: {type: binary_cross_entropy, pos_weight: auto}": """bce_pos_weight positive_weight
        positive_class_weight scale_pos_weight""",
    "objective.loss: {type: huber, delta: 1.0}": "huber_delta smooth_l1_beta",
    "objective.loss: {type: ldam, reweight_from: 0.8}": "drw use_drw deferred_reweighting drw_epoch",
    "objective.loss: {type: dice, smooth: 1.0}": "dice_smooth dice_loss use_dice_loss",
    "objective.problem": "problem_type",
    "objective.labels": "num_labels num_classes id2label label2id label_names label_list class_names",
    "objective.label_smoothing_factor": "label_smoothing label_smoothing_eps",
    "objective.train_on_prompt": "train_on_inputs train_on_input mask_prompt train_on_prompts",
    "objective.mlm_probability": "mlm_prob masking_probability mask_probability",
    "objective.max_target_length": "max_output_length max_completion_length val_max_target_length",
    "trainable.freeze": "freeze_layers freeze_modules freeze_parameters freeze_trainable_layers frozen",
    "trainable.freeze: [backbone]": """freeze_backbone freeze_encoder freeze_base freeze_base_model
        freeze_llm freeze_body train_head_only head_only linear_probe linear_probing""",
    "trainable.freeze: [embeddings]": "freeze_embeddings freeze_embedding",
    "trainable.unfreeze": "unfrozen_parameters unfreeze_layers trainable_parameters trainable_layers",
    "trainable.unfreeze: {every: 1 epoch}": """gradual_unfreezing gradual_unfreeze progressive_unfreezing
        gradual""",
    "trainable.unfreeze: [{at: 0.2, layers: last 2}]": """unfreeze_schedule unfreezing_schedule
        unfreeze_strategy unfreeze_at unfreeze_at_epoch unfreeze_backbone_at_epoch freeze_epochs
        freeze_schedule""",
    "trainable.unfreeze.at": """trainable.unfreeze.step trainable.unfreeze.epoch trainable.unfreeze.when
        trainable.unfreeze.start""",
    "trainable.layer_lr_decay": "layer_decay layerwise_lr_decay lr_layer_decay llrd layer_wise_lr_decay",
    "trainable.learning_rates: {head: 1e-3}": """head_lr head_learning_rate classifier_lr
        classifier_learning_rate lr_head""",
    "trainable.learning_rates: {embeddings: 1e-5}": "embedding_learning_rate embedding_lr embeddings_lr",
    "trainable.learning_rates: {…}": """lr_groups learning_rate_groups param_groups discriminative_lr
        discriminative_learning_rates differential_lr lr_multipliers backbone_lr backbone_learning_rate
        encoder_lr encoder_learning_rate decoder_lr decoder_learning_rate""",
    "trainable.cache_features": "cache_backbone precompute_features precompute_embeddings cache_embeddings",
    "trainable.head.hidden_layers": """head_hidden_layers head_hidden_sizes classifier_hidden_size
        trainable.head.hidden_size trainable.head.hidden_sizes trainable.head.layers trainable.head.width""",
    "trainable.head.pooling": "pooling_type pooling_mode pooling_strategy classifier_pooling trainable.head.pool",
    _LORA: """adapter finetuning_type tuner_type train_type use_peft peft peft_config lora lora_config qlora
        lora_r lora_rank lora_bias lora_target lora_target_modules lora_target_linear lora_attn_modules
        lora_modules_to_save additional_target peft_use_rslora peft_use_dora apply_lora_to_mlp
        apply_lora_to_output""",
    "trainable.adapters: [{type: lora, init_lora_weights: pissa}]": "pissa_init",
    "trainable.adapters: [{type: existing, path: …}]": """adapter_name_or_path lora_model_dir adapter_path
        adapters_path""",
    "trainable.adapters.type": "trainable.adapters.method trainable.adapters.adapter trainable.adapters.kind",
    "trainable.adapters.r": """trainable.adapters.rank trainable.adapters.lora_r trainable.adapters.lora_rank
        trainable.adapters.dim""",
    "trainable.adapters.lora_alpha": "trainable.adapters.alpha trainable.adapters.scaling",
    "trainable.adapters.lora_dropout": "trainable.adapters.dropout",
    "trainable.adapters.bias": "trainable.adapters.lora_bias",
    "trainable.adapters.target_modules": """trainable.adapters.lora_target trainable.adapters.targets
        trainable.adapters.lora_target_modules trainable.adapters.target trainable.adapters.modules
        trainable.adapters.lora_attn_modules""",
    "trainable.adapters.target_modules: all-linear": """trainable.adapters.lora_target_linear
        trainable.adapters.target_linear""",
    "trainable.adapters.modules_to_save": """trainable.adapters.lora_modules_to_save
        trainable.adapters.additional_target""",
    "trainable.adapters.layers_to_transform": """trainable.adapters.layers trainable.adapters.lora_layers
        trainable.adapters.peft_layers_to_transform""",
    "trainable.adapters.use_dora": "trainable.adapters.dora trainable.adapters.peft_use_dora",
    "trainable.adapters.use_rslora": """trainable.adapters.rslora trainable.adapters.peft_use_rslora
        trainable.adapters.rs_lora""",
    "trainable.adapters.init_lora_weights": """trainable.adapters.init trainable.adapters.init_weights
        trainable.adapters.peft_init_lora_weights""",
    "trainable.adapters.init_lora_weights: pissa": "trainable.adapters.pissa_init trainable.adapters.pissa",
    "trainable.adapters.loraplus_lr_ratio": """trainable.adapters.loraplus trainable.adapters.lr_ratio
        trainable.adapters.loraplus_ratio""",
    "trainable.adapters.num_virtual_tokens": """trainable.adapters.num_tokens trainable.adapters.prompt_length
        trainable.adapters.prefix_length trainable.adapters.pre_seq_len""",
    "trainable.adapters.path": """trainable.adapters.adapter_path trainable.adapters.adapter_name_or_path
        trainable.adapters.lora_model_dir""",
    "trainable.adapters.name": "trainable.adapters.adapter_name",
    "trainable.adapters.trainable": "trainable.adapters.is_trainable",
    "optim.name": "optimizer optimizer_name optimizer_type optim_type optim.type optim.optim",
    "optim.learning_rate": "lr base_lr max_lr peak_lr initial_lr",
    "optim.weight_decay": "wd weight_decay_rate optim.l2 .l2",
    "optim.betas: [0.9, 0.999]": "adam_beta1 adam_beta2 beta1 beta2 beta_1 beta_2 adam_betas",
    "optim.eps": "adam_epsilon adam_eps optim.epsilon .epsilon",
    "optim.max_grad_norm": """grad_clip gradient_clipping gradient_clip_val max_gradient_norm clip_grad_norm
        grad_clip_norm optim.max_norm .max_norm clip_norm""",
    "regularization.l1": "l1_lambda l1_penalty l1_reg l1_regularization l1_weight l1_coefficient",
    "regularization.l2": "l2_lambda l2_penalty l2_reg l2_regularization l2_weight l2_coefficient",
    "regularization.r_drop: {alpha: 1.0}": "rdrop use_rdrop rdrop_alpha r_drop_alpha regularized_dropout",
    "regularization.sharpness: {type: sam}": "sam use_sam sam_rho sharpness_aware_minimization",
    "regularization.sharpness: {type: asam}": "asam use_asam adaptive_sam",
    "regularization.adversarial: {type: fgm}": """fgm use_fgm adversarial_training adv_training adv_epsilon
        adversarial_epsilon""",
    "regularization.adversarial: {type: pgd}": "pgd use_pgd freelb use_freelb",
    "regularization.gradient_noise": "grad_noise gradient_noise_scale gradient_noise_std grad_noise_std",
    "regularization.max_norm: {value: 3.0}": """max_norm_constraint maxnorm weight_max_norm max_weight_norm
        kernel_constraint""",
    "remember.run": "remember.path remember.model remember.old_model remember.previous_run",
    "remember.l2_sp: {weight: 0.01}": """l2sp l2_sp_alpha l2_sp_weight pretrain_decay
        pretrained_weight_decay recadam""",
    "remember.l2_sp.weight": "remember.l2_sp.alpha remember.l2_sp.lambda remember.l2_sp.coefficient",
    "remember.l2_sp.new_weight": "remember.l2_sp.beta",
    "remember.anchor: {weight: 0.1, factor: 0.5}": "layerwise_anchor layer_wise_anchor layer_anchoring",
    "remember.anchor.factor": "remember.anchor.decay remember.anchor.gamma",
    "remember.ewc: {weight: 1000}": "ewc_lambda use_ewc ewc_weight fisher_weight si_lambda mas_lambda",
    "remember.ewc.weight": "remember.ewc.lambda remember.ewc.ewc_lambda remember.ewc.importance remember.ewc.alpha",
    "remember.ewc.rows": "fisher_samples remember.ewc.samples remember.ewc.num_samples remember.ewc.limit",
    "remember.ewc.labels: data": "empirical_fisher remember.ewc.empirical remember.ewc.mode",
    "remember.lwf: {weight: 1.0, temperature: 2.0}": """use_lwf lwf_alpha lwf_temperature
        lwf_lambda learning_without_forgetting""",
    "remember.lwf.weight": "remember.lwf.alpha remember.lwf.lambda",
    "remember.replay: {ratio: 0.1}": """replay_ratio mem_size memory_size replay_buffer_size replay_buffer
        use_replay experience_replay rehearsal rehearsal_ratio batch_size_mem""",
    "remember.replay.ratio": "remember.replay.fraction remember.replay.share remember.replay.weight",
    "remember.wise_ft: {alpha: 0.5}": "wiseft wise_ft_alpha weight_interpolation interpolation_alpha",
    "schedule.lr_scheduler_type": """lr_scheduler scheduler scheduler_type lr_schedule lr_scheduler_name
        learning_rate_scheduler schedule.type schedule.name""",
    "schedule.warmup_steps": """num_warmup_steps lr_warmup_steps warmup_num_steps n_warmup_steps .warmup
        schedule.warmup training.warmup optim.warmup""",
    "schedule.warmup_ratio": "warmup_fraction warmup_proportion warmup_pct lr_warmup_ratio",
    "schedule.min_lr_ratio": "min_lr min_learning_rate cosine_min_lr_ratio lr_end min_lr_rate",
    "training.num_train_epochs": """num_epochs epochs n_epochs .epoch training.epoch max_epochs
        train_epochs num_train_epoch""",
    "training.max_steps": """max_train_steps num_train_steps num_steps total_steps train_steps train_iters
        .steps training.steps schedule.steps max_steps_per_epoch""",
    "training.global_batch_size": """global_train_batch_size total_batch_size effective_batch_size
        total_train_batch_size""",
    "training.per_device_train_batch_size": """micro_batch_size micro_batch_size_per_gpu microbatch_size
        train_micro_batch_size_per_gpu per_gpu_train_batch_size per_device_batch_size device_batch_size
        device_train_microbatch_size local_batch_size""",
    "training.precision": """model.dtype training.dtype .dtype torch_dtype model_dtype mixed_precision amp
        half_precision""",
    "training.precision: bf16": "bf16 bfloat16 pure_bf16 bf16_full_eval",
    "training.precision: fp16": "fp16 float16 half fp16_full_eval",
    "training.torch_compile": "compile use_compile compile_model use_torch_compile",
    "training.seed": "random_seed data_seed manual_seed .seed",
    "parallel.strategy": "distributed_type distributed_strategy distributed parallelism ddp",
    "parallel.strategy: zero2 (or zero1, zero3)": "deepspeed deepspeed_config zero_stage zero_optimization",
    "parallel.strategy: fsdp2": "fsdp fsdp_config fsdp_version fsdp_sharding_strategy",
    "parallel.timeout": "ddp_timeout ddp_timeout_seconds nccl_timeout process_group_timeout",
    "parallel.tensor_parallel_size": "tp_size tp_degree tensor_parallel_degree tensor_parallel",
    "parallel.sequence_parallel_size": """context_parallel_size sequence_parallel_degree cp_size sp_size
        context_parallel_degree ulysses_size ulysses_degree""",
    "parallel.shard_size": "dp_shard_size hsdp_shard_size hybrid_shard_size fsdp_size dp_shard",
    "parallel.offload_optimizer": "offload_optimizer_device cpu_offload_optimizer",
    "parallel.offload_parameters": "offload_param offload_param_device",
    "parallel.offload": "fsdp_offload_params cpu_offload offload_params",
    "kernels: auto": """use_liger_kernel enable_liger_kernel use_liger liger_kernel liger_rope liger_rms_norm
        liger_cross_entropy liger_fused_linear_cross_entropy use_unsloth use_triton use_kernels""",
    "evaluation.tune_thresholds: {metric: macro_f1}": "threshold_tuning optimize_threshold tune_threshold",
    "evaluation.calibrate: temperature": "temperature_scaling calibration calibrate_temperature",
    "evaluation.eval_steps": """eval_strategy evaluation_strategy evals_per_epoch eval_freq eval_every
        eval_interval eval_every_n_steps validation_steps val_check_interval run_val_every_n_steps""",
    "evaluation.per_device_eval_batch_size": """eval_batch_size per_gpu_eval_batch_size val_batch_size
        validation_batch_size""",
    "evaluation.metrics": ".metric evaluation.metric eval_metrics eval_metric compute_metrics compute_accuracy",
    "evaluation.metric_for_best": "metric_for_best_model best_metric monitor early_stopping_metric",
    "evaluation.early_stopping: {patience: 3}": """early_stopping_patience early_stopping_steps
        early_stopping_threshold early_stop""",
    "evaluation.generate": "predict_with_generate generation_config",
    "evaluation.generate.max_new_tokens": "generation_max_length eval_max_new_tokens",
    "evaluation.generate.num_beams": "generation_num_beams beam_size eval_beams",
    "checkpoint.save_steps": """save_strategy saves_per_epoch save_interval save_every save_freq
        save_every_n_steps checkpointing_steps checkpoint_every checkpoint_interval""",
    "checkpoint.save_total_limit": "keep_last_n max_checkpoints keep_checkpoint_max keep_last_n_checkpoints",
    "checkpoint.final: best": "load_best_model_at_end save_best save_best_only save_only_best",
    "tracking.logging_steps": """log_every_n_steps log_every log_freq log_interval logging_interval log_steps
        logging_strategy""",
    "tracking.progress: off": "disable_tqdm",
    "tracking.wandb: {mode: online}": "report_to use_wandb log_with logger metric_logger",
    "tracking.wandb.mode": "wandb_mode",
    "tracking.wandb.project": "wandb_project project_name",
    "tracking.wandb.entity": "wandb_entity",
    "tracking.wandb.tags": "wandb_tags",
    "output_dir": "output_path out_dir save_dir save_path checkpoint_dir ckpt_dir",
    "run_name": "wandb_name wandb_run_name exp_name experiment_name experiment .name",
}  # fmt: skip

_DERIVED = (
    "is derived from the batch sizes and the number of processes: set training.global_batch_size (rows per "
    "optimizer step over all processes)"
)
_WHICH_BATCH = (
    "is ambiguous: set training.global_batch_size (rows per optimizer step over all processes) or "
    "training.per_device_train_batch_size (rows per forward of one process)"
)
_LAUNCH = (
    "is an option of the launch, not of the recipe: tunesmith train RECIPE --num-processes N --num-machines M"
)
_ABSENT = "is not available in this version"
_NEEDLESS = "has no counterpart here: leave it out"

# sentences, for names that are not one setting of ours
_NOTES = {
    _DERIVED: """gradient_accumulation_steps gradient_accumulation grad_accum grad_accum_steps gas
        grad_accumulation_steps accumulate_grad_batches gradient_acc_steps""",
    _WHICH_BATCH: ".batch_size training.batch_size train_batch_size",
    _LAUNCH: """num_processes num_machines world_size nproc_per_node nnodes num_nodes num_gpus n_gpus
        n_gpu gpus devices gpus_per_node""",
    "is not a setting: a stopped run is continued from the command line": """resume resume_from_checkpoint
        auto_resume_from_checkpoints resume_training""",
    "is not a setting: weights are always saved as safetensors": "save_safetensors",
    "is not a setting: what a run logs is in its folder, output_dir/run_name": "logging_dir log_dir",
    "is not a setting: a run is known by output_dir and run_name": "overwrite_output_dir",
    "is not a setting: sft trains on the assistant's turns only, objective.train_on_prompt on the others too":
        "completion_only_loss assistant_only_loss roles_to_train train_on_eos",
    "is not a setting: rows in data.train are trained on, rows in data.eval evaluated":
        "do_train do_eval do_predict",
    "is not a setting: a file's kind is read from its name": "ds_type file_type data.train.file_format",
    "is no key of its own here: write its contents as keys of optim": """optim_args optimizer_kwargs
        optimizer_params""",
    "is no key of its own here: write its contents as keys of schedule": """lr_scheduler_kwargs
        scheduler_kwargs""",
    "is no key here: the sections (model, data, objective, …) stand at the top level": """training_args
        training_arguments trainer trainer_args sft_config sft""",
    "stands in an entry of a list: write unfreeze: [{at: …, layers: …}]":
        "trainable.unfreeze.at trainable.unfreeze.parameters",
    "stands alone, in no list: write unfreeze: {every: …}": "trainable.unfreeze.every",
    _ABSENT: """streaming push_to_hub hub_model_id hub_strategy auto_find_batch_size tf32 fp8
        pipeline_parallel_size ema model_ema
        galore_rank use_galore use_badam lisa_n_layers lisa_step_interval lisa_layers_attribute
        lisa_activated_layers lisa_interval_steps""",
    _NEEDLESS: """dataset_num_proc dataset_processes preprocessing_num_workers dataloader_num_workers
        dataloader_pin_memory dataloader_prefetch_factor dataloader_drop_last num_workers plot_loss
        include_tokens_per_second include_num_input_tokens_seen logging_first_step logging_nan_inf_filter
        remove_unused_columns ddp_find_unused_parameters ddp_bucket_cap_mb save_only_model
        pad_to_sequence_len pad_to_max_length auto_resume average_tokens_across_devices plugins
        low_cpu_mem_usage use_cache special_tokens overwrite_cache""",
}  # fmt: skip


def plain(name: object) -> str:
    """A name as it is looked up: in lower case, `-` and blanks as `_`."""
    return str(name).strip().lower().replace("-", "_").replace(" ", "_")


def by_name(table: dict[str, str]) -> dict[str, str]:
    return {name: ours for ours, names in table.items() for name in names.split()}


KEYS = by_name(_OURS)
"""Another tool's key → ours, as `section.key` or `section.key: value`."""

NOTES = by_name(_NOTES)
"""Another tool's key → the sentence that says what to do instead."""
