from mpillm.train.optimizers.adamw import AdamWSettings
from tests.train.optimizers.paths import adamw_reference, check_close, optimized, referred


def test_it_is_the_paper_s() -> None:
    check_close(optimized(AdamWSettings(weight_decay=0.3)), referred(adamw_reference, 0.3))
