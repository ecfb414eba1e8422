// The grid of images: only the rows in view are in the page, so thousands of images cost no more than a screenful.

const GAP = 12, TEXT = 62, ROWS_BEYOND = 2; // pixels; pixels of a card below its image; rows above and below the view

export class Grid {
  /** fill(card, item) writes a card's content; on.open(item), on.pick(item, event) are called for clicks. */
  constructor(scroller, element, fill, on) {
    Object.assign(this, { scroller, element, fill, on, items: [], cards: new Map(), columns: 1, cell: 0, row: 0 });
    scroller.addEventListener("scroll", () => this.draw(), { passive: true });
    new ResizeObserver(() => this.layout()).observe(scroller);
    element.addEventListener("click", event => {
      const card = event.target.closest(".card");
      if (!card) return;
      if (event.target.closest(".tick") || event.shiftKey || event.ctrlKey || event.metaKey) on.pick(card.item, event);
      else on.open(card.item);
    });
  }

  show(items) {
    this.items = items;
    this.layout();
  }

  layout() {
    const style = getComputedStyle(this.scroller);
    const width = this.scroller.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
    const least = width < 420 ? 104 : 142;
    this.columns = Math.max(1, Math.floor((width + GAP) / (least + GAP)));
    this.cell = Math.floor((width - GAP * (this.columns - 1)) / this.columns);
    this.row = this.cell + TEXT + GAP;
    this.element.style.height = `${Math.ceil(this.items.length / this.columns) * this.row}px`;
    this.clear();
    this.draw();
  }

  clear() {
    this.element.replaceChildren();
    this.cards.clear();
  }

  draw() {
    const top = this.scroller.scrollTop, height = this.scroller.clientHeight;
    const first = Math.max(0, Math.floor(top / this.row) - ROWS_BEYOND) * this.columns;
    const last = Math.min(this.items.length, (Math.ceil((top + height) / this.row) + ROWS_BEYOND) * this.columns);
    for (const [place, card] of this.cards)
      if (place < first || place >= last) {
        card.remove();
        this.cards.delete(place);
      }
    for (let place = first; place < last; place++) if (!this.cards.has(place)) this.make(place);
  }

  make(place) {
    const card = document.createElement("div");
    card.item = this.items[place];
    card.setAttribute("role", "option");
    card.dataset.place = place;
    Object.assign(card.style, {
      left: `${(place % this.columns) * (this.cell + GAP)}px`, top: `${Math.floor(place / this.columns) * this.row}px`,
      width: `${this.cell}px`, height: `${this.row - GAP}px`,
    });
    this.fill(card, card.item);
    this.cards.set(place, card);
    this.element.append(card);
  }

  /** Write the cards in view again, those of all items or of some. */
  refresh(isAffected = () => true) {
    for (const card of this.cards.values()) if (isAffected(card.item)) this.fill(card, card.item);
  }

  reveal(item) {
    const place = this.items.indexOf(item);
    if (place < 0) return;
    const top = Math.floor(place / this.columns) * this.row, bottom = top + this.row;
    if (top < this.scroller.scrollTop) this.scroller.scrollTop = top;
    else if (bottom > this.scroller.scrollTop + this.scroller.clientHeight)
      this.scroller.scrollTop = bottom - this.scroller.clientHeight + GAP;
  }
}
