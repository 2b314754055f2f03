"""Every setting of every stage: frozen dataclasses, strict about names, types and bounds.

Field descriptions are what ``--help`` prints. `montessori_jax.config_file` fills them from YAML.
"""

from montessori_jax.config.evaluation import EvaluationConfig, HarnessConfig
from montessori_jax.config.fields import (
    as_dict,
    setting,
)
from montessori_jax.config.generation import (
    FilterConfig,
    GenerationConfig,
    ResponseConfig,
    SamplingConfig,
)
from montessori_jax.config.influence import (
    InfluenceConfig,
    PreferencesConfig,
)
from montessori_jax.config.judging import (
    BASELINE_HELP,
    AlpacaEvalConfig,
    AnswerConfig,
    HeadToHeadConfig,
    MtBenchConfig,
)
from montessori_jax.config.mesh import MeshConfig
from montessori_jax.config.methods import (
    BootstrapConfig,
    JudgingConfig,
    Llm2llmConfig,
)
from montessori_jax.config.run import (
    GENERATOR_HELP,
    DataConfig,
    GeneratorName,
    RunConfig,
)
from montessori_jax.config.serving import (
    JudgeConfig,
    Price,
    UrlConfig,
    VllmConfig,
)
from montessori_jax.config.training import (
    ATTENTION_HELP,
    Attention,
    DpoConfig,
    OptimizerConfig,
    SftConfig,
    TrainingConfig,
    WarmupConfig,
)

__all__ = [
    "ATTENTION_HELP",
    "BASELINE_HELP",
    "GENERATOR_HELP",
    "AlpacaEvalConfig",
    "AnswerConfig",
    "Attention",
    "BootstrapConfig",
    "DataConfig",
    "DpoConfig",
    "EvaluationConfig",
    "FilterConfig",
    "GenerationConfig",
    "GeneratorName",
    "HarnessConfig",
    "HeadToHeadConfig",
    "InfluenceConfig",
    "JudgeConfig",
    "JudgingConfig",
    "Llm2llmConfig",
    "MeshConfig",
    "MtBenchConfig",
    "OptimizerConfig",
    "PreferencesConfig",
    "Price",
    "ResponseConfig",
    "RunConfig",
    "SamplingConfig",
    "SftConfig",
    "TrainingConfig",
    "UrlConfig",
    "VllmConfig",
    "WarmupConfig",
    "as_dict",
    "setting",
]
