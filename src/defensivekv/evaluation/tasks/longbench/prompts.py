"""LongBench's prompts, and how each is divided into what is compressed and what is asked.

The texts are LongBench's own (config/dataset2prompt.json of https://github.com/THUDM/LongBench at 8ae23fd, MIT
licence): they are the protocol. Its older wording, which many copies still hold, says "asconcisely" in narrativeqa.

    head | passage | gap | instruction | ask
    ---------- authors ----|------ question ----      the repeated instruction is seen after compression
    ---------------- kvpress ----------|-- question   and here it is compressed with the passage

With "authors" the context is what comes before the passage, the passage, and the white space after it; the rest is
the question, LongBench's closing words ("Answer:") included. With "kvpress" the closing words are the answer's prefix.
Under both, context + question + prefix is LongBench's own prompt, letter by letter.
"""

from dataclasses import dataclass

SPLITS = ("authors", "kvpress")
"""As the authors' harness divides (https://github.com/FFY0/DefensiveKV), and as kvpress's data does."""


@dataclass(frozen=True)
class Prompt:
    """One dataset's prompt: head, passage, gap, instruction and ask, where ask holds "{input}".

    answer_prefix: LongBench's closing words, which end ask or, for few-shot datasets, the record's own input.
    """

    head: str
    gap: str
    instruction: str
    ask: str
    answer_prefix: str

    def divide(self, split: str, passage: str, asked: str) -> tuple[str, str, str]:
        """Context, question and answer prefix of a record with that context and input."""
        context, question = self.head + passage + self.gap, self.ask.replace("{input}", asked)
        if split == "authors":
            return context, self.instruction + question, ""
        # Few-shot records end with the prefix themselves; one that does not keeps LongBench's prompt as it is.
        prefix = self.answer_prefix if question.endswith(self.answer_prefix) else ""
        return context + self.instruction, question.removesuffix(prefix), prefix


_PASSAGES = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other words."
)
_MULTI_DOCUMENT = Prompt(
    head=f"{_PASSAGES}\n\nThe following are given passages.\n",
    gap="\n\n",
    instruction=f"{_PASSAGES}\n\n",
    ask="Question: {input}\nAnswer:",
    answer_prefix="Answer:",
)
_NARRATIVE = "as concisely as you can, using a single phrase if possible. Do not provide any explanation.\n\n"
_QASPER = (
    "as concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based "
    'on the information in the article, write "unanswerable". If the question is a yes/no question, answer "yes", '
    '"no", or "unanswerable". Do not provide any explanation.\n\n'
)
_CODE = "Please complete the code given below. \n"

PROMPTS: dict[str, Prompt] = {
    "narrativeqa": Prompt(
        "You are given a story, which can be either a novel or a movie script, and a question. Answer the question "
        f"{_NARRATIVE}Story: ",
        "\n\n",
        f"Now, answer the question based on the story {_NARRATIVE}",
        "Question: {input}\n\nAnswer:",
        "Answer:",
    ),
    "qasper": Prompt(
        f"You are given a scientific article and a question. Answer the question {_QASPER}Article: ",
        "\n\n",
        f" Answer the question based on the above article {_QASPER}",
        "Question: {input}\n\nAnswer:",
        "Answer:",
    ),
    "multifieldqa_en": Prompt(
        "Read the following text and answer briefly.\n\n",
        "\n\n",
        "Now, answer the following question based on the above text, only give me the answer and do not output any "
        "other words.\n\n",
        "Question: {input}\nAnswer:",
        "Answer:",
    ),
    "hotpotqa": _MULTI_DOCUMENT,
    "2wikimqa": _MULTI_DOCUMENT,
    "musique": _MULTI_DOCUMENT,
    "gov_report": Prompt(
        "You are given a report by a government agency. Write a one-page summary of the report.\n\nReport:\n",
        "\n\n",
        "",
        "Now, write a one-page summary of the report.\n\nSummary:",
        "Summary:",
    ),
    "qmsum": Prompt(
        "You are given a meeting transcript and a query containing a question or instruction. Answer the query in one "
        "or more sentences.\n\nTranscript:\n",
        "\n\n",
        "Now, answer the query based on the above meeting transcript in one or more sentences.\n\n",
        "Query: {input}\nAnswer:",
        "Answer:",
    ),
    "multi_news": Prompt(
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n",
        "\n\n",
        "",
        "Now, write a one-page summary of all the news.\n\nSummary:",
        "Summary:",
    ),
    "trec": Prompt(
        "Please determine the type of the question below. Here are some examples of questions.\n\n",
        "\n",
        "",
        "{input}",
        "Type:",
    ),
    "triviaqa": Prompt(
        "Answer the question based on the given passage. Only give me the answer and do not output any other words. "
        "The following are some examples.\n\n",
        "\n\n",
        "",
        "{input}",
        "Answer:",
    ),
    "samsum": Prompt(
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n",
        "\n\n",
        "",
        "{input}",
        "Summary:",
    ),
    "passage_count": Prompt(
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully "
        "read these paragraphs and determine how many unique paragraphs there are after removing duplicates. In other "
        "words, how many non-repeating paragraphs are there in total?\n\n",
        "\n\n",
        "",
        "Please enter the final count of unique paragraphs after removing duplicates. The output format should only "
        "contain the number, such as 1, 2, 3, and so on.\n\nThe final answer is: ",
        "The final answer is: ",
    ),
    "passage_retrieval_en": Prompt(
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the abstract "
        "is from.\n\n",
        "\n\n",
        "The following is an abstract.\n\n",
        "{input}\n\nPlease enter the number of the paragraph that the abstract is from. The answer format must be like "
        '"Paragraph 1", "Paragraph 2", etc.\n\nThe answer is: ',
        "The answer is: ",
    ),
    "lcc": Prompt(_CODE, "", "", "Next line of code:\n", "Next line of code:\n"),
    "repobench-p": Prompt(_CODE, "", "", "{input}Next line of code:\n", "Next line of code:\n"),
}
"""The prompt of each of the 16 English datasets."""
