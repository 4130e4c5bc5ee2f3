"""Print how often each judge errs: the README's table.

    python data/check_judges.py

Real scenes of test captions, rebuilt by the tokenizer, and ten ways to break them: SETS sets of CAPTIONS
captions, two pictures each, and as many intact sets that fix the limits. Seeds 0 to SETS - 1 and 10000
upwards. Under two minutes on an idle CPU core.
"""

from speedrl_lab import load_generator
from speedrl_lab.evaluate import load_jury
from speedrl_lab.judge_check import as_markdown, check_judges

SETS, CAPTIONS = 8, 48

if __name__ == "__main__":
    generator = load_generator(device="cpu")
    print(as_markdown(check_judges(generator, load_jury(), SETS, CAPTIONS)))
