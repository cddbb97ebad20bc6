// "Copy" puts a table on the clipboard as tab-separated text, ready for a spreadsheet.
for (const button of document.querySelectorAll(".copy")) {
  button.addEventListener("click", async () => {
    const rows = [...button.parentElement.querySelectorAll("tr")];
    const text = rows.map((row) => [...row.cells].map((cell) => cell.innerText.trim()).join("\t"));
    try {
      await navigator.clipboard.writeText(text.join("\n"));
      button.textContent = "Copied";
    } catch {
      const range = document.createRange();
      range.selectNode(button.parentElement.querySelector("table"));
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
}
