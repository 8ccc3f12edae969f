"""The files that publishers gave out, each by its sha256: `fetch` takes these bytes and no others.

Hashes are of the publishers' own files at the commit that a URL names. Those of archives, GSM8K, HumanEval, MBPP, DROP,
MATH and ConCode are the ones that Hugging Face's `datasets` kept in its dataset_infos.json, too. CRASS and HHH have no
commit in their URLs: their hashes are of the files in the package bigbench 1.0.0. No hash is known of the files of
MedQA, PubMedQA and DS-1000: they are not listed.
"""

from dataclasses import dataclass

_RAW = "https://raw.githubusercontent.com"


@dataclass(frozen=True)
class HubFile:
    """A file in a repository of data on the hub, at a commit."""

    repository: str
    revision: str
    path: str


@dataclass(frozen=True)
class Download:
    """A file to fetch, and the hash that it has."""

    path: str
    """Where it lies in the data set's folder; of an archive, the folder in it that is unpacked ("data")."""
    source: str | HubFile
    """A URL, or a file on the hub."""
    sha256: str
    members: tuple[str, ...] = ()
    """Of a tar or zip archive: patterns of the files below `path` that are kept; its other files are not."""


@dataclass(frozen=True)
class Release:
    """What is fetched of a data set: all of its files, or none."""

    name: str
    """Of its folder in fedcli's cache, and of a benchmark that reads it."""
    license: str
    downloads: tuple[Download, ...]


def _files(name: str, license: str, base: str, files: dict[str, str]) -> Release:
    """Return the release of files that lie below a URL, by path."""
    return Release(name, license, tuple(Download(path, f"{base}/{path}", sha256) for path, sha256 in files.items()))


_FASTCHAT = f"{_RAW}/lm-sys/FastChat/0e6d3e4beaab66f4d3f93db72541a4abab8af28d/fastchat/llm_judge/data"
_JUDGE_PROMPTS = Download(
    "judge_prompts.jsonl",
    f"{_FASTCHAT}/judge_prompts.jsonl",
    "fd283293406d024f44c174b094ef48031d0687a4682fd3a56b29b138f80281b6",
)


def _fastchat(name: str, folder: str, questions: str, references: str) -> Release:
    files = {"question.jsonl": questions, "reference_answer/gpt-4.jsonl": references}
    own = _files(name, "Apache-2.0", f"{_FASTCHAT}/{folder}", files)
    return Release(own.name, own.license, (*own.downloads, _JUDGE_PROMPTS))


MT_BENCH = _fastchat(
    "mt-bench",
    "mt_bench",
    "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
    "f957a5bc977badb66885ec970e6cd08527845780313f0995764260e5777b9b3f",
)
VICUNA = _fastchat(
    "vicuna",
    "vicuna_bench",
    "c248c5c98ba45bb0c2aadae2f270e643bd32679c6c306a3b2a503ac4254cdaa5",
    "f7542dc25a5a869b32197486f5699a14eb5682ab3c7264518402399ec09ab470",
)
ADVBENCH = _files(
    "advbench",
    "MIT",
    f"{_RAW}/llm-attacks/llm-attacks/098262edf85f807224e70ecd87b9d83716bf6b73/data/advbench",
    {"harmful_behaviors.csv": "6cd1a5c63c07610d7eb67307772ee5606017ee950b5770ab288a2c487489d3e1"},
)
GSM8K = _files(
    "gsm8k",
    "MIT",
    f"{_RAW}/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data",
    {"test.jsonl": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"},
)
HUMANEVAL = _files(
    "humaneval",
    "MIT",
    f"{_RAW}/openai/human-eval/6d43fb980f9fee3c892a914eda09951f772ad10d/data",
    {"HumanEval.jsonl.gz": "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef"},
)
MBPP = _files(
    "mbpp",
    "CC BY 4.0",
    f"{_RAW}/google-research/google-research/4700efb9afa54286b0e04473ba80a13e8461e25f/mbpp",
    {"mbpp.jsonl": "ccf64ceae9c5403bf50a044cb6d505bfd2a2963ee58338ba268fd65beab92a9f"},
)
HUMANEVALPACK = Release(
    "humanevalfix",
    "MIT",
    (
        Download(
            "python/test-00000-of-00001.parquet",
            HubFile(
                "bigcode/humanevalpack",
                "9a41762f73a8cb23bb5811b73d5aab164efcf378",
                "python/test-00000-of-00001.parquet",
            ),
            "ed5f15d789156e21222bfcd556c425a39042355c84ae1e8b058abd6a3d7f8075",
        ),
    ),
)
CONALA = Release(
    "conala",
    "MIT",
    (
        Download(
            "conala-test.json",
            HubFile("neulab/conala", "fbc749f1c537e5c3834e93b15784302e331debe2", "data/conala-paired-test.json"),
            "3a7e5eea6deeccb5e7c9557534af860854fd2f0ae870752b42c296ed30e53cb7",
        ),
    ),
)
CONCODE = _files(
    "concode",
    "C-UDA",
    f"{_RAW}/madlag/CodeXGLUE/main/Text-Code/text-to-code/dataset/concode",
    {"dev.json": "cd4f91cfaa12a886a1d7acaf92eaf8ab066845c37a9221e56634d345958c922a"},
)
MMLU = Release(
    "mmlu",
    "MIT",
    (
        Download(
            "data",
            HubFile("cais/mmlu", "c30699e8356da336a370243923dbaf21066bb9fe", "data.tar"),
            "bec563ba4bac1d6aaf04141cd7d1605d7a5ca833e38f994051e818489592989b",
            ("test/*.csv", "dev/*.csv"),
        ),
    ),
)
BBH = _files(
    "bbh",
    "MIT",
    f"{_RAW}/suzgunmirac/BIG-Bench-Hard/9ee07bd481feebf959a6b59d61ea57bdcf30964d/bbh",
    {
        "boolean_expressions.json": "ea6c754ec005e2d3f2d085d349a740f593b5764f32ea4638ffed4cfc0061b12a",
        "causal_judgement.json": "6e8bca44dd402008ed41c07a3d0a1d5e7b03db7001a7e002fcdf4c60985ea081",
        "date_understanding.json": "0148d4ac5fca05b2f82373e5fef7208e15363b9c6079493034d77b3dab496bf5",
        "disambiguation_qa.json": "cf06df9ebf911b883671cb1b35d3fbd1a1c306b19b9e9a012407e596c85fe8c6",
        "dyck_languages.json": "3f9badedf15c2be1ce53d94fdf016299bb30ba231ef087ab9f51a7ed6d0bdc25",
        "formal_fallacies.json": "4c1adb664821157faade1d4153685403afcc02648f3c180a608a18f17f589629",
        "geometric_shapes.json": "07be68a124420caa2ebc0b2c858ad79fc55c5c8806170e496e1e17ebfb11f31c",
        "hyperbaton.json": "b6d7f55c75f5d02f2987a4f3123802dfa093872089a56a334144aae8a7264fdc",
        "logical_deduction_five_objects.json": "d2df31394b903b7f0e085d42a69572a092987856eac076799017d70ef266fa8f",
        "logical_deduction_seven_objects.json": "2896c7e3482eea318dd37bcc370d24ec3cc91e8374c1784287b5dbd38a529e33",
        "logical_deduction_three_objects.json": "e590fae72e3a6041fbd23bd8ff6b74baf44ca563f6ba40a041c55e7b867c1681",
        "movie_recommendation.json": "a8b53a87ee21a865b7248e694f388a9b8f7cf6b839b11d44796a2dd3fc088983",
        "multistep_arithmetic_two.json": "c9d5a6433c9b78256422a15c78463949c8bec8d85607aa28b52d7234ad4a8595",
        "navigate.json": "b7944dfd3c81da5c4815bd75b00d6fa3c64140823498e78ed496f4c3d36f7f0d",
        "object_counting.json": "8acef14dbbdd40d2326ef7755750b6b5fe919fef06276af1bab3f1c297f022ff",
        "penguins_in_a_table.json": "bb87ee449698eee51215e025a453b1bcb2f5e6589c2063b2c79e68b8f0655228",
        "reasoning_about_colored_objects.json": "0a8850cf95166020fce7a78244026ceedd7ea839302471512b4f8744e85a6a49",
        "ruin_names.json": "b6f723aef2bafdd4c7bfc3c7e0329c7e8a8279391a609969c8ed76c9319f5f7f",
        "salient_translation_error_detection.json": "becf3eb8dd53c821a555ecd5c1334ecd93eb25f980e63be963c518e7138de5da",
        "snarks.json": "54a0661fe2de06167645a4965e6bcf963c4ba307e76262a7c750998b0e3d0d0e",
        "sports_understanding.json": "63ca262858f6176864515cd8cf53cdaa40839ebecc155b726d77930855d167bf",
        "temporal_sequences.json": "92a1189faaa84aacc4c405aaa13f13f48c2992eb884772eedb622505252baef5",
        "tracking_shuffled_objects_five_objects.json": (
            "2063a46a4fb484236ed4310523606543a3e1dd4a4dc34eda65d407910ece25a5"
        ),
        "tracking_shuffled_objects_seven_objects.json": (
            "b59fd05b850c37cf57cb514ae1e6975c00b1638ade2291722056b2af3c54084d"
        ),
        "tracking_shuffled_objects_three_objects.json": (
            "546cc7bf10c6a01a6a4c17ae28a4966485f21f29fd5d111f37858ec78e354f6b"
        ),
        "web_of_lies.json": "3e60323f8514a107fdb4edf35f8832a9171c5a09c0eaa47823559de905e8ab8b",
        "word_sorting.json": "2a6132d2c99f00d0d2eb1113ac6b4a918bd969d863c48749210d969713db8d43",
    },
)
DROP = Release(
    "drop",
    "CC BY-SA 4.0",
    (
        Download(
            "drop_dataset",
            "https://s3-us-west-2.amazonaws.com/allennlp/datasets/drop/drop_dataset.zip",
            "39d2278a29fd729de301b111a45f434c24834f40df8f4ff116d864589e3249d6",
            ("*.json",),
        ),
    ),
)
MATH = Release(
    "math",
    "MIT",
    (
        Download(
            "MATH",
            "https://people.eecs.berkeley.edu/~hendrycks/MATH.tar",
            "01256fd7cd5430596fdf07e6e6a5827111b5235b7ffed679c662a12f898932da",
            ("test/*.json", "train/*.json"),
        ),
    ),
)
MEDMCQA = Release(
    "medmcqa",
    "Apache-2.0",
    tuple(
        Download(path, HubFile("openlifescienceai/medmcqa", "91c6572c454088bf71b679ad90aa8dffcd0d5868", path), sha256)
        for path, sha256 in {
            "data/train-00000-of-00001.parquet": "b119434ba551517a6ec0ba1f7e0b4c029165ed284a4704f262ce37c791c493c5",
            "data/validation-00000-of-00001.parquet": (
                "b768a1ea34afc9f80d3106d9b21f80fa8a00ec450a1f6cd641af72ca9e591021"
            ),
        }.items()
    ),
)
_BIG_BENCH = f"{_RAW}/google/BIG-bench/main/bigbench/benchmark_tasks"
CRASS = _files(
    "crass",
    "Apache-2.0",
    f"{_BIG_BENCH}/crass_ai",
    {"task.json": "7336d2c999f353b6fdaaa351ebf1138ea37eb38488593276f56e1d6faeed95bb"},
)
HHH = _files(
    "hhh",
    "Apache-2.0",
    f"{_BIG_BENCH}/hhh_alignment",
    {
        "harmless/task.json": "4720acbc916cc18413e48c6bb55c19af73400436a6304c7e110b8bb40f8952a1",
        "helpful/task.json": "1bd2a58d9bb17b26af4806e8302374cea60671dc387fbfc2c5aa5c23e0901628",
        "honest/task.json": "69ba96e5bff121327ad1366e3772b7b45c50e96e7f995b2cef62c350380f1b14",
        "other/task.json": "4d6b041d79e5bf2705a9f81994efb95274179faaba9270f6dc83bd0cd17c227e",
    },
)
FPB = Release(
    "fpb",
    "CC BY-NC-SA 3.0",
    (
        Download(
            "FinancialPhraseBank-v1.0",
            HubFile(
                "takala/financial_phrasebank",
                "8d3fe0c36d5feec6b3cc5e455b0fcb4820fb9964",
                "data/FinancialPhraseBank-v1.0.zip",
            ),
            "0e1a06c4900fdae46091d031068601e3773ba067c7cecb5b0da1dcba5ce989a6",
            ("*.txt",),
        ),
    ),
)
_FINLORA = f"{_RAW}/Open-Finance-Lab/FinLoRA/7e1cf82803aa56a5f698d71e1528395e16b21093/data/test"
FIQA = _files(
    "fiqa",
    "not stated by the challenge",
    _FINLORA,
    {"fiqa_test.jsonl": "b93474e5bf55eecd367fc342da9b4501758dcb4a45d64454e24955dc9b2cc56f"},
)
NWGI = _files(
    "nwgi",
    "not stated by the publisher",
    _FINLORA,
    {"nwgi_test.jsonl": "b350a0eb3f908a2576013307653fe4b2bcca00c2d16af85c02c9191b46ec2508"},
)
TFNS = Release(
    "tfns",
    "MIT",
    (
        Download(
            "sent_valid.csv",
            HubFile(
                "zeroshot/twitter-financial-news-sentiment",
                "ccbe24de388e287beb92dd393a335c376b350ac3",
                "sent_valid.csv",
            ),
            "31ea8274c98b52212daa68f2fb962811bf1913c1efe51b99765c8e2311806de6",
        ),
    ),
)
