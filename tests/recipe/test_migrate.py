"""Recipes of other tools become alignkit's: each kind of file, every key accounted for, and what cannot be said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from alignkit.recipe import load_recipe
from alignkit.recipe.migrate import AUTOMATIC, CONVERTED, LEFT, RENAMED, SAME, Migration, migrate_file


def migrate(path: Path, text: str, *, gpus: int | None = None) -> Migration:
    """Migrate a file of one configuration; what comes out is a recipe that loads, with every key in the report."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    (made,), problems = migrate_file(path, gpus=gpus)
    assert problems == []
    assert len({row.key for row in made.rows}) == len(made.rows)
    out = path.with_name("migrated.yaml")
    out.write_text(made.text)
    load_recipe(out)
    return made


def body(made: Migration) -> str:
    """The recipe without the comments at its top."""
    return "\n".join(line for line in made.text.splitlines() if not line.startswith("#"))


def kinds(made: Migration) -> dict[str, str]:
    return {row.key: row.what for row in made.rows}


def test_axolotl(tmp_path: Path) -> None:
    made = migrate(tmp_path / "a.yml", """
        base_model: org/base-7b
        load_in_8bit: false
        load_in_4bit: true
        adapter: qlora
        lora_r: 64
        lora_dropout: 0.1
        lora_target_linear: true
        datasets:
          - path: org/talks
            type: chat_template
            field_messages: conversations
            roles: {user: [human]}
          - path: ./own.jsonl
            ds_type: json
            split: train[:50%]
        val_set_size: 0.02
        output_dir: ./out
        sequence_len: 2048
        sample_packing: true
        gradient_accumulation_steps: 4
        micro_batch_size: 2
        num_epochs: 2
        evals_per_epoch: 5
        optimizer: adamw_bnb_8bit
        lr_scheduler: cosine
        learning_rate: 2e-4
        bf16: auto
        tensor_parallel_size: 2
        wandb_project:
        """, gpus=8)  # fmt: skip
    assert body(made) == "\n".join([
        "model:",
        "  quantization: nf4  # was adapter: qlora",
        "  path: org/base-7b  # was base_model",
        "  dtype: bfloat16  # was bf16: auto",
        "lora:",
        "  r: 64  # was lora_r",
        "  dropout: 0.1  # was lora_dropout",
        "  target_modules: all-linear  # was lora_target_linear: true",
        "launch:",
        "  processes: 8  # of --gpus",
        "data:  # was datasets",
        "  - {path: org/talks}",
        '  - {path: ./own.jsonl, split: "train[:50%]"}',
        "eval: 0.02  # was val_set_size",
        "sft:",
        "  batch_size: 64  # 2 on a device x 4 accumulated x 8 GPUs",
        "  micro_batch_size: 2",
        "  max_length: 2048  # was sequence_len",
        "  packing: true  # was sample_packing",
        "  num_train_epochs: 2  # was num_epochs",
        "  eval_steps: 0.1  # was evals_per_epoch: 5",
        "  optim: adamw_bnb_8bit  # was optimizer",
        "  lr_scheduler_type: cosine  # was lr_scheduler",
        "  learning_rate: 0.0002",
    ])  # fmt: skip
    assert made.text.splitlines()[1:3] == [
        "# What alignkit cannot do, or somebody has to write:",
        "# - tensor_parallel_size: alignkit shards data, optimizer and weights (launch.strategy), and no layer over "
        "several devices",
    ]
    said = kinds(made)
    assert said["learning_rate"] == said["micro_batch_size"] == SAME
    assert said["lora_r"] == RENAMED and said["gradient_accumulation_steps"] == said["bf16"] == CONVERTED
    assert said["load_in_8bit"] == said["wandb_project"] == said["datasets[0].roles.user"] == AUTOMATIC
    assert said["output_dir"] == said["tensor_parallel_size"] == LEFT


def test_alignment_handbook_says_its_method_by_its_folder(tmp_path: Path) -> None:
    made = migrate(tmp_path / "zephyr" / "dpo" / "config_full.yaml", """
        model_name_or_path: org/sft-7b
        torch_dtype: bfloat16
        dataset_mixer: {org/pairs: 1.0, org/more: 0.5}
        dataset_splits: [train_prefs, test_prefs]
        do_eval: true
        beta: 0.05
        per_device_train_batch_size: 8
        gradient_accumulation_steps: 2
        learning_rate: 5.0e-7
        max_prompt_length: 512
        num_train_epochs: 1
        max_steps: 50
        warmup_ratio: 0.1
        push_to_hub: true
        use_peft: false
        lora_r: 16
        """)  # fmt: skip
    text = body(made)
    assert "data:  # was dataset_mixer\n  - {path: org/pairs, split: train_prefs}\n  - {path: org/more" in text
    assert "weight: 0.5, split: train_prefs}" in text
    assert "eval:  # was dataset_splits\n  - {path: org/pairs, split: test_prefs}\n  - {path: org/more" in text
    assert "dpo:\n  batch_size: 16  # 8 on a device x 2 accumulated x 1 GPU (--gpus says how many)" in text
    assert "  warmup_steps: 0.1  # was warmup_ratio" in text and "  learning_rate: 5e-7" in text
    assert "  lr_scheduler_type: linear  # alignment-handbook's default" in text
    assert "lora" not in text and "num_train_epochs" not in text  # max_steps counts
    said = kinds(made)
    assert said["lora_r"] == said["num_train_epochs"] == AUTOMATIC and said["max_prompt_length"] == LEFT


def test_llama_factory_reads_its_registry_of_data_sets(tmp_path: Path) -> None:
    registry = {
        "pairs": {"file_name": "pairs.json", "ranking": True, "columns": {"prompt": "ask", "chosen": "good"}},
        "hub": {"hf_hub_url": "org/ranked", "subset": "en", "split": "train_sft"},
    }
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(registry))
    made = migrate(tmp_path / "examples" / "dpo.yaml", """
        model_name_or_path: org/base
        stage: dpo
        finetuning_type: lora
        lora_target: all
        pref_beta: 0.2
        pref_loss: simpo
        dataset: pairs,hub,unknown
        max_samples: 100
        cutoff_len: 1024
        per_device_train_batch_size: 1
        gradient_accumulation_steps: 8
        bf16: true
        flash_attn: fa2
        deepspeed: examples/deepspeed/ds_z3_config.json
        image_max_pixels: 1000
        """)  # fmt: skip
    text = body(made)
    pairs = tmp_path / "data" / "pairs.json"
    assert f"  - {{path: {pairs}, columns: {{prompt: ask, chosen: good}}, max_rows: 100}}\n" in text
    assert "  - {path: org/ranked, name: en, split: train_sft, max_rows: 100}\n" in text
    assert "  strategy: zero3  # was deepspeed: examples/deepspeed/ds_z3_config.json" in text
    assert "  loss_type: simpo  # was pref_loss" in text and "  beta: 0.2  # was pref_beta" in text
    assert "lora:\n  target_modules: all-linear  # was lora_target: all\n  r: 8  # LLaMA-Factory's default" in text
    assert made.missing == [
        "data: unknown is a name of dataset_info.json, which is not beside the file",
        "image_max_pixels: text only: models with images, sound or video are not trained",
    ]


def test_torchtune(tmp_path: Path) -> None:
    made = migrate(tmp_path / "t.yaml", """
        output_dir: /tmp/out
        model:
          _component_: torchtune.models.llama3.qlora_llama3_8b
          lora_attn_modules: [q_proj, output_proj]
          apply_lora_to_mlp: true
          lora_rank: 8
          lora_alpha: 16
        tokenizer: {_component_: torchtune.models.llama3.llama3_tokenizer, path: /m/tok, max_seq_len: 512}
        checkpointer: {_component_: torchtune.training.FullModelHFCheckpointer, checkpoint_dir: /m, model_type: LLAMA3}
        dataset: {_component_: torchtune.datasets.alpaca_cleaned_dataset, packed: true}
        batch_size: 4
        batch_size_val: ${batch_size}
        epochs: 2
        max_steps_per_epoch: 30
        gradient_accumulation_steps: 2
        optimizer: {_component_: bitsandbytes.optim.PagedAdamW8bit, lr: 1e-4}
        lr_scheduler: {_component_: torchtune.training.get_cosine_schedule_with_warmup, num_warmup_steps: 9}
        loss: {_component_: torchtune.modules.loss.LinearCrossEntropyLoss}
        dtype: bf16
        """)  # fmt: skip
    text = body(made)
    assert "  target_modules: [q_proj, o_proj, gate_proj, up_proj, down_proj]" in text
    assert "data: {path: yahma/alpaca-cleaned}  # was dataset\n" in text
    for line in ("path: /m  # was checkpointer.checkpoint_dir", "batch_size: 8  # 4 on a device x 2 accumulated",
                 "packing: true  # was dataset.packed", "optim: paged_adamw_8bit", "lr_scheduler_type: cosine",
                 "max_steps: 60  # was max_steps_per_epoch: 30", "warmup_steps: 9", "weight_decay: 0.01  # torchtune's",
                 "max_grad_norm: 0  # torchtune's default", "dtype: bfloat16", "quantization: nf4"):  # fmt: skip
        assert f"\n  {line}" in text, line
    assert kinds(made)["batch_size_val"] == AUTOMATIC  # 4, but there are no held-out rows


def test_oumi(tmp_path: Path) -> None:
    made = migrate(tmp_path / "o.yaml", """
        model: {model_name: org/base, model_max_length: 1024, torch_dtype_str: bfloat16, trust_remote_code: true}
        data:
          train: {datasets: [{dataset_name: org/prompts, split: train, mixture_proportion: 0.5}]}
          validation: {datasets: [{dataset_name: org/prompts, split: test}]}
        training:
          trainer_type: TRL_GRPO
          use_peft: false
          per_device_train_batch_size: 4
          gradient_accumulation_steps: 2
          learning_rate: 1e-6
          max_steps: 10
          grpo: {num_generations: 4, max_completion_length: 64, use_vllm: true, epsilon: 0.1}
        """)  # fmt: skip
    text = body(made)
    assert "data: {path: org/prompts, split: train}" in text
    assert "  advantage: grpo  # was training.trainer_type: TRL_GRPO\n  kl_in: loss" in text
    assert "  generation:\n    engine: vllm  # was training.grpo.use_vllm: true" in text
    assert "  max_new_tokens: 64  # was training.grpo.max_completion_length" in text
    assert "  reward: path/to/reward-model  # to be written" in text  # so that nothing is trained on a wrong reward
    assert "cliprange" not in text and kinds(made)["training.grpo.epsilon"] == AUTOMATIC  # one step per rollout
    assert [one.split(": ")[0] for one in made.missing] == ["data.train.datasets[0].mixture_proportion", "reward"]


def test_commands_of_ms_swift(tmp_path: Path) -> None:
    made = migrate(tmp_path / "lora.sh", r"""
        # two cards
        MODEL="${MODEL:-org/base}"
        CUDA_VISIBLE_DEVICES=0,1 \
        NPROC_PER_NODE=2 \
        swift rlhf \
            --rlhf_type dpo \
            --model $MODEL \
            --dataset 'org/pairs:zh#500' ms::org/more \
            --per_device_train_batch_size 1 \
            --gradient_accumulation_steps 16 \
            --target_modules q_proj v_proj \
            --rpo_alpha 0.1 \
            --deepspeed zero1 \
            --system "You are kind."
        """)  # fmt: skip
    text = body(made)
    assert "data:  # was dataset\n  - {path: org/pairs, name: zh, max_rows: 500}\n  - {path: org/more}\n" in text
    assert "lora:\n  target_modules: [q_proj, v_proj]" in text and "  alpha: 32  # ms-swift's default" in text
    assert "  batch_size: 32  # 1 on a device x 16 accumulated x 2 GPUs" in text
    assert "  loss_weights: [1.0, 0.1]" in text and "  loss_type: [sigmoid, sft]  # was rpo_alpha" in text
    assert "  processes: 2  # was NPROC_PER_NODE\n  strategy: zero2" in text
    assert "  path: org/base  # was model" in text
    assert made.missing == ["system: a system message stands in the rows: a column `system`, or a first message"]


def test_a_method_is_never_taken_out_with_what_it_lacks(tmp_path: Path) -> None:
    made = migrate(tmp_path / "gkd.sh", "swift rlhf --rlhf_type gkd --model org/a --dataset org/d"
                   """ --gradient_checkpointing_kwargs '{"use_reentrant": false}'""")  # fmt: skip
    assert "\nsft:\n  objective: distill  # was rlhf_type: gkd" in body(made)
    assert "\n  teacher:\n    model: path/to/teacher  # to be written" in body(made)
    assert "  gradient_checkpointing_kwargs:\n    use_reentrant: false" in body(made)
    assert made.missing == ["teacher.model: write the teacher that is learnt from"]


def test_commands_of_openrlhf_and_trl(tmp_path: Path) -> None:
    made = migrate(tmp_path / "ppo.sh", r"""
        read -r -d '' training_commands <<EOF
        openrlhf.cli.train_ppo_ray \
           --actor.model_name_or_path org/policy \
           --reward.model_name_or_path org/rm \
           --train.batch_size 128 \
           --rollout.batch_size 1024 \
           --rollout.n_samples_per_prompt 4 \
           --algo.advantage.estimator group_norm \
           --data.prompt_dataset org/prompts --data.input_key context \
           --actor.adam.lr 5e-7 --critic.adam.lr 9e-6 \
           --ds.zero_stage 3 --vllm.num_engines 2
        EOF
        deepspeed --module $training_commands
        """)  # fmt: skip
    text = body(made)
    assert "data: {path: org/prompts, columns: {prompt: context}}" in text
    for line in ("minibatches: 32  # was rollout.batch_size: 1024", "reward: org/rm", "advantage: grpo",
                 "num_generations: 4", "learning_rate: 5e-7"):  # fmt: skip
        assert f"\n  {line}" in text, line
    assert "  strategy: zero3  # was ds.zero_stage: 3" in text
    path = tmp_path / "docs.md"
    path.write_text("""
        python trl/scripts/dpo.py \\
            --model_name_or_path org/a --dataset_name org/p --use_peft --lora_r 4
        accelerate launch --num_processes 4 scripts/reward_modeling.py --model_name_or_path=org/b --dataset_name=org/p
        python own.py --model_name_or_path x
        """)
    (dpo, rm), problems = migrate_file(path)
    assert problems == [] and (dpo.name, rm.name) == ("docs", "docs-2")
    assert "lora:\n  r: 4" in dpo.text and "\n  learning_rate: 1e-6  # TRL's default" in dpo.text
    assert "\nrm:\n  batch_size: 32  # 8 on a device x 1 accumulated x 4 GPUs" in rm.text


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.yaml", "just: a file", "a.yaml: is not recognised as a training recipe or command of torchtune, axolotl, "
         "oumi, LLaMA-Factory, ms-swift, OpenRLHF, alignment-handbook, TRL"),
        ("a.yaml", "base_model: x\ndatasets: [", "a.yaml:2: cannot be read: "),
        ("a.sh", "swift rlhf --rlhf_type nash_md --model x --dataset y", "a.sh: ms-swift's nash_md: alignkit has no "
         "such method; `dpo:` learns from pairs, `ppo:` from a reward"),
        ("a.yaml", "a: " + "[" * 3000 + "]" * 3000, "a.yaml: cannot be read: it is nested too deeply"),
        ("absent.sh", None, "absent.sh: cannot be read: No such file or directory"),
    ],
)  # fmt: skip
def test_what_cannot_be_migrated_is_said(tmp_path: Path, name: str, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    made, (problem,) = migrate_file(tmp_path / name)
    assert made == [] and str(problem).removeprefix(f"{tmp_path}/").startswith(said)


def test_values_that_other_tools_write_in_their_way(tmp_path: Path) -> None:
    """Booleans of another kind, sums of a shell, arrays of arguments, and a key that says more than its method."""
    head = "A=$(expr 4 / 0) swift rlhf --model org/m --dataset org/d --train_type full --reward_funcs accuracy"
    made = migrate(
        tmp_path / "a.sh",
        f"""
        each=2
        NPROC_PER_NODE=4 {head} --rlhf_type grpo --advantage_estimator rloo --kl_in_reward true --beta 0.1 \\
            --per_device_train_batch_size $each --gradient_accumulation_steps $(expr 32 / $each) --num_iterations 2 \\
            --steps_per_generation 48 --overlong_filter false --vllm_tensor_parallel_size 1
    """,
    )
    for line in ("advantage: rloo", "kl_in: reward", "batch_size: 128", "ppo_epochs: 2", "minibatches: 3"):
        assert f"\n  {line}" in made.text
    assert "overlong" not in made.text and made.missing == []
    assert kinds(made)["vllm_tensor_parallel_size"] == AUTOMATIC
    for value, ours in (("true", "group"), ("false", "none"), ("batch", "batch")):
        made = migrate(tmp_path / "c.sh", f"{head} --rlhf_type grpo --scale_rewards {value}\n")
        assert f"scale_rewards: {ours}" in made.text

    made = migrate(
        tmp_path / "b.sh",
        """
        WORK=/runs
        PLACES=(
            --actor.model_name_or_path org/m
            --ckpt.path "${WORK}/checkpoints"
        )
        REST=(--data.prompt_dataset org/d --train.batch_size 64 --rollout.batch_size 128)
        ray job submit --address=http://127.0.0.1:1 -- python3 -m openrlhf.cli.train_ppo_ray "${PLACES[@]}" ${REST[@]}
    """,
    )
    assert "batch_size: 64" in made.text and "minibatches: 2" in made.text
    assert not {"", "address"} & {row.key for row in made.rows if row.what == LEFT}


def test_what_is_lost_of_a_switch_is_said(tmp_path: Path) -> None:
    made = migrate(
        tmp_path / "dpo" / "a.yaml",
        """
        model_name_or_path: org/m
        dataset_mixer: {org/d: 1.0}
        chat_template: "{% for message in messages %}{{ message.content }}{% endfor %}"
        sync_ref_model: true
        packing: false
        hub_model_id: me/model
        hub_strategy: every_save
        save_steps: 50
    """,
    )
    assert [text.split(":")[0] for text in made.missing] == ["chat_template", "sync_ref_model"]
    assert kinds(made)["packing"] == AUTOMATIC
    assert "push_to: me/model" in made.text and "push_every: 50" in made.text


def test_other_roles_are_not_taken_for_the_model(tmp_path: Path) -> None:
    made = migrate(
        tmp_path / "a.yaml",
        """
        model: {model_name: org/small, torch_dtype_str: bfloat16}
        data: {train: {datasets: [{dataset_name: org/d}]}}
        training:
          trainer_type: TRL_GKD
          gkd:
            teacher_model_name_or_path: org/big
            teacher_model_init_kwargs: {attn_implementation: eager}
            temperature: 0.9
            beta: 0.3
            lmbda: 0.5
    """,
    )
    assert "eager" not in body(made)
    for line in ("model: org/big", "temperature: 0.9", "beta: 0.3", "on_policy: 0.5"):
        assert f"\n    {line}" in made.text

    made = migrate(
        tmp_path / "b.yaml",
        """
        tokenizer: {_component_: torchtune.models.mistral.mistral_tokenizer}
        model: {_component_: torchtune.models.mistral.mistral_7b}
        reward_and_value_model: {_component_: torchtune.models.mistral.mistral_classifier_7b, num_layers: 32}
        checkpointer: {checkpoint_dir: /tmp/policy}
        reward_checkpointer: {checkpoint_dir: /tmp/reward}
        value_checkpointer: {checkpoint_dir: /tmp/reward}
        dataset: {_component_: torchtune.datasets.text_completion_dataset, source: org/d, column: prompt}
        loss: {_component_: torchtune.rlhf.loss.PPOLoss, value_coeff: 0.2, value_clip_range: 0.3}
        optimizer: {_component_: torch.optim.AdamW, lr: 3e-6}
        batch_size: 16
        num_steps: 160
        max_generated_tokens: 58
        min_response_length: 18
        penalise_no_eos: true
        reward_penalty: -3
        lmbda: 0.9
    """,
    )
    assert "path: /tmp/policy" in made.text and "score: -3" in made.text and made.missing == []
    for line in (
        "reward: /tmp/reward", "vf_coef: 0.2", "cliprange_value: 0.3", "total_episodes: 160", "max_new_tokens: 58",
        "min_new_tokens: 18", "lam: 0.9",
    ):  # fmt: skip
        assert f"\n  {line}" in made.text


def test_kto_of_axolotl(tmp_path: Path) -> None:
    made = migrate(
        tmp_path / "a.yml",
        """
        base_model: org/m
        rl: kto
        rl_beta: 0.5
        kto_desirable_weight: 0.2
        kto_undesirable_weight: 2.0
        sample_packing: false
        datasets: [{path: org/d, type: llama3.ultra}]
    """,
    )
    for line in ("loss_type: kto", "beta: 0.5", "desirable_weight: 0.2", "undesirable_weight: 2.0"):
        assert f"\n  {line}" in made.text
    assert LEFT not in kinds(made).values()


def test_what_a_launcher_is_told_is_known(tmp_path: Path) -> None:
    accelerate = migrate(tmp_path / "a.sh", """
        accelerate launch --use_fsdp --fsdp_version 2 --mixed_precision bf16 --machine_rank 1 \\
            --main_process_ip 10.0.0.1 --num_machines 2 --num_processes 16 --same_network --max_restarts 3 \\
            --module sft.py --model_name_or_path org/base --dataset_name org/talks --learning_rate 1e-5
        """)  # fmt: skip
    assert "  strategy: fsdp  # was use_fsdp: true\n" in accelerate.text
    assert "  dtype: bfloat16  # was mixed_precision: bf16\n" in accelerate.text
    said = kinds(accelerate)
    assert {said[key] for key in ("module", "machine_rank", "main_process_ip", "same_network", "fsdp_version")} == {
        AUTOMATIC
    }
    assert said["max_restarts"] == LEFT
    torchrun = migrate(tmp_path / "b.sh", """
        torchrun --standalone --nproc_per_node=8 --rdzv_backend c10d --master_port 29501 dpo.py \\
            --model_name_or_path org/base --dataset_name org/pairs
        """)  # fmt: skip
    assert {kinds(torchrun)[key] for key in ("standalone", "rdzv_backend", "master_port")} == {AUTOMATIC}
    assert torchrun.missing == accelerate.missing == []
    deepspeed = migrate(tmp_path / "c.sh", """
        deepspeed --hostfile hosts --include worker:0,1 --module openrlhf.cli.train_sft --train.batch_size 128 \\
            --actor.model_name_or_path org/base --data.dataset org/talks --ds.lora.rank 12 --ds.lora.alpha 32
        """)  # fmt: skip
    assert {kinds(deepspeed)[key] for key in ("hostfile", "include", "module")} == {AUTOMATIC}
    assert "  r: 12  # was ds.lora.rank" in deepspeed.text and "  alpha: 32  # was ds.lora.alpha" in deepspeed.text
    script = migrate(tmp_path / "d.sh", """
        trl sft --accelerate_config zero3 --model_name_or_path org/base --dataset_name org/talks
        """)  # fmt: skip
    assert "  strategy: zero3  # was accelerate_config\n" in script.text


def test_what_is_taken_back_with_no_is_off(tmp_path: Path) -> None:
    made = migrate(tmp_path / "a.sh", """
        python sft.py --model_name_or_path org/base --dataset_name org/talks --no_bf16 --no_gradient_checkpointing \\
            --no_remove_unused_columns --no_such_thing
        """)  # fmt: skip
    assert "  gradient_checkpointing: false  # was no_gradient_checkpointing: true" in made.text
    assert "dtype" not in made.text
    assert [(row.key, row.what) for row in made.rows[2:]] == [
        ("no_bf16", AUTOMATIC), ("no_gradient_checkpointing", CONVERTED), ("no_remove_unused_columns", AUTOMATIC),
        ("no_such_thing", LEFT),
    ]  # fmt: skip


def test_a_strategy_that_a_method_refuses_goes_and_not_the_method(tmp_path: Path) -> None:
    made = migrate(tmp_path / "a.sh", """
        swift rlhf --rlhf_type gkd --model org/base --teacher_model org/large --dataset org/talks --deepspeed zero3 \\
            --beta 0.5 --temperature 0.9 --lmbda 1 --max_completion_length 64 --gkd_logits_topk 20 --use_vllm true
        """)  # fmt: skip
    assert "  objective: distill" in made.text and "strategy" not in body(made)
    assert made.missing == [
        "deepspeed: sft.objective is distill, whose teacher zero3 would shard with the student; use ddp, zero2 or fsdp"
    ]
    teacher = body(made).partition("  teacher:\n")[2]
    for line in (
        "model: org/large",
        "beta: 0.5",
        "temperature: 0.9",
        "max_new_tokens: 64",
        "top_k: 20",
        "on_policy: 1",
    ):
        assert f"    {line}  # was " in teacher
    assert kinds(made)["use_vllm"] == LEFT


def test_a_command_in_the_text_of_a_program_has_its_backslashes_twice(tmp_path: Path) -> None:
    made = migrate(tmp_path / "a.py", """
        python3 -m openrlhf.cli.train_ppo_ray \\\\
            --actor.model_name_or_path org/base --data.prompt_dataset org/prompts \\\\
            --algo.advantage.estimator rloo
        """)  # fmt: skip
    assert "  path: org/base" in made.text and "  advantage: rloo  # was " in made.text


def test_an_estimator_by_its_own_name_is_the_one_it_is_here(tmp_path: Path) -> None:
    made = migrate(tmp_path / "a.sh", """
        swift rlhf --rlhf_type grpo --advantage_estimator reinforce_plus_plus --model org/base --dataset org/prompts \\
            --num_generations 4 --per_device_train_batch_size 4
        """)  # fmt: skip
    assert "  advantage: reinforce  # was advantage_estimator: reinforce_plus_plus" in made.text
