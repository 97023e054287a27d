import pytest

from brgsa_jax import registry


def test_register_get_and_miss():
    @registry.register("test kind", "apple")
    def apple():
        return 1

    assert registry.get("test kind", "apple") is apple
    assert registry.names("test kind") == ("apple",)
    with pytest.raises(KeyError, match="did you mean 'apple'"):
        registry.get("test kind", "aple")
    with pytest.raises(KeyError, match="none registered"):
        registry.get("no such kind", "x")
    with pytest.raises(ValueError, match="twice"):
        registry.register("test kind", "apple")(lambda: 2)
