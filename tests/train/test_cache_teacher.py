import json

import jax
import numpy as np
import pytest

from samlight_jax import weights
from samlight_jax.errors import InputError
from tests.train import runs
from train import augment, cache, cache_teacher, data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A teacher, photographs, and their cache in shards of 8 records."""
    folder = tmp_path_factory.mktemp("cache")
    runs.teacher(folder)
    runs.photographs(folder / "photographs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "SHARD", 8)
        cache_teacher.write(config(folder))
        yield folder


def config(folder, **changes):
    return cache_teacher.CacheConfig(
        **{
            **{"out": str(folder / "cache"), "data": (str(folder / "photographs"),)},
            **{"teacher": str(folder / "teacher.safetensors"), "canvas": 64, "image_size": 64},
            **{"views": 2, "batch": 3, "dtype": "float32", "seed": 5},
        }
        | changes
    )


def manifest(folder):
    return json.loads((folder / "cache" / cache.MANIFEST).read_text())


def test_a_record_is_the_teachers_embedding_of_its_view(folder):
    given = config(folder)
    held = cache.Cache(given.out)
    assert (held.count, held.views, held.seed) == (10, 2, 5)
    arrays, model_config, _ = weights.read(folder / "teacher.safetensors")
    teacher = weights.build(model_config, arrays)
    photos = data.Photos(given.data, (), 64)
    for item in (0, 7, 13, 19):
        one = jax.tree.map(lambda x: x[None], photos[item % 10])
        keys = cache.keys_of(5, np.array([item], np.int32))
        views = augment.views(**one, keys=keys, augment=held.augment, image_size=64)
        want = np.asarray(teacher.encode(views.pixels)[0][0], np.float32)
        got = held[item].astype(np.float32)
        # bfloat16 keeps 8 bits.
        assert np.abs(got - want).max() <= 2**-8 * np.abs(want).max()
        assert np.abs(want).max() > 0.1


def test_views_of_one_photograph_differ(folder):
    held = cache.Cache(config(folder).out)
    assert np.abs(held[3].astype(np.float32) - held[13].astype(np.float32)).max() > 0.1


def test_shards_that_are_there_are_not_made_again(folder):
    path = folder / "cache"
    before = {x: x.stat().st_mtime_ns for x in path.iterdir()}
    gone = path / cache.shard_name(1)
    content = gone.read_bytes()
    gone.unlink()
    with pytest.raises(InputError, match="lacks 1 of 3 shards"):
        cache.Cache(str(path))
    cache_teacher.write(config(folder))
    after = {x: x.stat().st_mtime_ns for x in path.iterdir()}
    assert {x for x in after if after[x] != before[x]} == {gone}
    assert len(gone.read_bytes()) == len(content)


@pytest.mark.parametrize(
    ("needed", "sentence"),
    [
        ({"teacher": "x"}, "teacher is .*, this run has 'x'"),
        ({"photographs": "x"}, "photographs is"),
        ({"image_size": 128}, "image_size is 64, this run has 128"),
        ({"canvas": 32}, "canvas is 64, this run has 32"),
    ],
)
def test_a_cache_of_something_else_is_refused(folder, needed, sentence):
    with pytest.raises(InputError, match=sentence):
        cache.Cache(config(folder).out, **needed)


def test_no_cache_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no teacher's cache"):
        cache.Cache(str(tmp_path))


def test_another_cache_is_not_overwritten(folder):
    before = manifest(folder)
    with pytest.raises(InputError, match="holds another cache"):
        cache_teacher.write(config(folder, views=3))
    assert manifest(folder) == before
