from train import cache
from train.config import Augment


def test_a_manifest_comes_back_from_json_as_it_was():
    manifest = cache.Manifest(
        teacher="t",
        photographs="p",
        count=3,
        views=2,
        seed=0,
        augment=Augment(),
        image_size=64,
        canvas=32,
    )
    found = manifest.to_json()
    assert found["augment"]["scale"] == list(Augment().scale)
    assert found["format"] == cache.FORMAT and found["count"] == 3
