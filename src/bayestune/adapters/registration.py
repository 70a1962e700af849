"""The PEFT type "BAYES_LORA". Only this file changes PEFT's enumeration of methods.

PEFT has no public way for another package to add a member. A plain string is not enough, because code in PEFT and
transformers reads `peft_type.value`.
"""

from peft import PeftType
from peft.utils import register_peft_method

_NAME = "BAYES_LORA"


def _add_member() -> PeftType:
    if _NAME in PeftType.__members__:
        raise ImportError(
            "this version of peft already has a method named BAYES_LORA, which is not bayestune's; "
            "install a peft version in the range that bayestune's metadata asks for."
        )
    member = str.__new__(PeftType, _NAME)
    member._name_ = member._value_ = _NAME
    object.__setattr__(member, "_sort_order_", len(PeftType.__members__))
    PeftType._member_names_.append(_NAME)
    PeftType._member_map_[_NAME] = member
    PeftType._value2member_map_[_NAME] = member
    type.__setattr__(PeftType, _NAME, member)
    return member


BAYES_LORA = _add_member()


def register(config_cls: type, model_cls: type) -> None:
    """Register the method with `get_peft_model`, `PeftConfig.from_pretrained` and the Auto classes."""
    register_peft_method(name="bayes_lora", config_cls=config_cls, model_cls=model_cls, prefix="lora_")
