"""Arguments that upstream's parser accepts and does not pass on to the model.

core_v0.19.0 parses ``--rope-scaling-factor`` (megatron/training/arguments.py) and
``gpt_config_from_args`` (megatron/training/argument_utils.py) leaves it out, so that every Llama
3.x model is scaled by GPTModelConfig's default, 8. tests/test_upstream_arguments.py compares every
argument that the harness emits with the configuration upstream builds from it.
"""

from functools import wraps


def install() -> None:
    """Wrap ``gpt_config_from_args``, which upstream's and the harness's script call.

    Call it before either script is imported: both import the function by name.
    """
    from megatron.training import argument_utils

    make_config = argument_utils.gpt_config_from_args

    @wraps(make_config)
    def with_every_argument(args, *rest, **kwargs):
        config = make_config(args, *rest, **kwargs)
        config.rope_scaling_factor = args.rope_scaling_factor
        return config

    argument_utils.gpt_config_from_args = with_every_argument
