"""Options of TRL's GRPOConfig that do not exist here, and what to use. The command line and docs/trl.md say it."""

from __future__ import annotations

# (what to use, the names)
_GROUPS: tuple[tuple[str, str], ...] = (
    ("give generation_batch_size; the updates of a rollout follow from it", "steps_per_generation"),
    ("evaluation is noise-free, one response a prompt; latent-grpo eval samples more", "num_generations_eval"),
    ("evaluation samples all prompts of eval_dataset", "per_device_eval_batch_size eval_accumulation_steps"),
    ("give eval_steps; 0 evaluates never", "eval_strategy eval_delay eval_on_start do_eval"),
    ("give logging_steps", "logging_strategy logging_first_step"),
    ("give save_steps; 0 saves only at the end", "save_strategy"),
    (
        "give dtype, which is bfloat16 on CUDA by default; float32 copies are kept, see master_weights",
        "bf16 fp16 bf16_full_eval fp16_full_eval",
    ),
    ("give device", "use_cpu local_rank"),
    (
        "give gradient_checkpointing",
        "activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing_kwargs",
    ),
    ("the model is in evaluation mode in any case: dropout would put noise on the ratio", "disable_dropout"),
    ("logits are float32 in any case", "cast_lm_head_to_fp32"),
    (
        "seed also draws the data order, which is new in every epoch",
        "data_seed shuffle_dataset full_determinism train_sampling_strategy",
    ),
    ("all columns reach the reward functions", "remove_unused_columns label_names"),
    ("give top_p or top_k; there is no such filter", "min_p repetition_penalty"),
    ("give the sampling options one by one", "generation_kwargs cache_implementation use_cache"),
    (
        "load the model yourself and give the object to LatentGRPOTrainer",
        "model_init_kwargs trust_remote_code",
    ),
    (
        "importance_sampling_cap bounds the ratio per token (TRL's token_truncate)",
        "vllm_importance_sampling_correction vllm_importance_sampling_mode vllm_importance_sampling_clip_max "
        "vllm_importance_sampling_cap",
    ),
    ("the ratio has no lower bound; importance_sampling_cap is the upper one", "vllm_importance_sampling_clip_min"),
    (
        "latent steps need a decoding loop of its own; rollouts do not use vLLM or continuous batching",
        "use_vllm vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_structured_outputs_regex "
        "vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port "
        "vllm_gpu_memory_utilization vllm_max_model_length vllm_tensor_parallel_size "
        "use_transformers_continuous_batching transformers_continuous_batching_config use_transformers_paged",
    ),
    ("rewards are added with reward_weights, then normalized", "multi_objective_aggregation"),
    ("the reference stays the initial model", "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps"),
    ("every text step has a loss; a latent step has no entropy to select it by", "top_entropy_quantile"),
    (
        "give a constant entropy_coef",
        "use_adaptive_entropy entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target",
    ),
    ("give delta or importance_sampling_cap", "off_policy_mask_threshold"),
    ("there are no tools", "max_tool_calling_iterations"),
    ("models with experts are trained without a balancing loss", "router_aux_loss_coef"),
    ("prompts and responses are padded to their longest", "pad_to_multiple_of"),
    (
        "the loss and the sampler are fused already",
        "use_liger_kernel liger_kernel_config torch_compile torch_compile_backend torch_compile_mode",
    ),
    (
        "give log_completions; it writes Parquet files to output_dir",
        "log_completions_hub_repo log_multimodal log_unique_prompts",
    ),
    (
        "upload output_dir with the hf command",
        "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision "
        "trackio_space_id trackio_bucket_id trackio_static_space_id",
    ),
    (
        "start with torchrun; the model is then sharded",
        "fsdp fsdp_config deepspeed ds3_gather_for_generation accelerator_config parallelism_config "
        "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend "
        "ddp_timeout",
    ),
    (
        "give optim, adam_beta1, adam_beta2 and weight_decay; nothing else of the optimizer is open",
        "optim_args adam_epsilon optim_target_modules lr_scheduler_kwargs",
    ),
    (
        "a checkpoint holds all that a run needs, and save_total_limit keeps the newest",
        "save_only_model save_on_each_node enable_jit_checkpoint restore_callback_states_from_checkpoint "
        "ignore_data_skip load_best_model_at_end metric_for_best_model greater_is_better",
    ),
    (
        "the trainer is not that of transformers; it has no such switch",
        "average_tokens_across_devices label_smoothing_factor tf32 neftune_noise_alpha torch_empty_cache_steps "
        "auto_find_batch_size log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen log_level "
        "log_level_replica disable_tqdm prediction_loss_only eval_do_concat_batches eval_use_gather_object "
        "include_for_metrics batch_eval_metrics dataloader_drop_last dataloader_num_workers dataloader_pin_memory "
        "dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context "
        "dataloader_in_order length_column_name debug skip_memory_metrics do_train do_predict",
    ),
)

HINTS = {name: hint for hint, names in _GROUPS for name in names.split()}

# Names that other trainers (verl, OpenRLHF) and `generate` of transformers have for options that exist here.
SYNONYMS = {
    "max_new_tokens": "max_completion_length",
    "max_response_length": "max_completion_length",
    "generate_max_len": "max_completion_length",
    "prompt_max_len": "max_prompt_length",
    "num_return_sequences": "num_generations",
    "n_samples_per_prompt": "num_generations",
    "rollout_n": "num_generations",
    "rollout_batch_size": "generation_batch_size",
    "ppo_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "micro_train_batch_size": "per_device_train_batch_size",
    "ppo_epochs": "num_iterations",
    "total_epochs": "num_train_epochs",
    "max_epochs": "num_iterations",
    "total_training_steps": "max_rollouts",
    "lr": "learning_rate",
    "actor_learning_rate": "learning_rate",
    "grad_clip": "max_grad_norm",
    "kl_loss_coef": "beta",
    "init_kl_coef": "beta",
    "entropy_coeff": "entropy_coef",
    "clip_ratio": "epsilon",
    "clip_ratio_low": "epsilon",
    "clip_ratio_high": "epsilon_high",
    "clip_ratio_c": "delta",
    "loss_agg_mode": "loss_type",
    "filter_groups": "group_filter",
    "save_freq": "save_steps",
    "test_freq": "eval_steps",
    "logger": "report_to",
    "experiment_name": "run_name",
    "project_name": "project",
    "train_files": "dataset",
    "val_files": "eval_dataset",
    "prompt_data": "dataset",
    "pretrain": "model_name_or_path",
    "model": "model_name_or_path",  # in Python and YAML; every command has a flag of this name
    "data": "dataset",
    "out": "output_dir",
}
