"use strict";
(() => {
  const content = JSON.parse(document.getElementById("content").textContent);
  const at = (id) => document.getElementById(id);
  const byId = new Map(content.tasks.map((task) => [task.id, task]));
  const slot = "mmhooks-human-" + content.study;
  let state = null; // participant, started, order, place, answers
  let since = 0;

  // A hash of the participant's code seeds the order of the tasks, so that a reloaded page goes on in the same order.
  const seedOf = (text) => {
    let h = 2166136261;
    for (const c of text) h = Math.imul(h ^ c.codePointAt(0), 16777619);
    return h >>> 0;
  };
  const generator = (seed) => () => { // mulberry32
    seed = (seed + 0x6d2b79f5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
  const shuffled = (list, random) => {
    const out = [...list];
    for (let i = out.length - 1; i > 0; i--) {
      const j = Math.floor(random() * (i + 1));
      [out[i], out[j]] = [out[j], out[i]];
    }
    return out;
  };
  const orderFor = (participant) => {
    const random = generator(seedOf(content.study + participant));
    const of = (kind) => content.tasks.filter((task) => task.kind === kind).map((task) => task.id);
    return [...shuffled(of("intruder"), random), ...shuffled(of("name"), random)];
  };

  // The places in a task, too: else all participants who cannot tell and prefer the first place would agree.
  const placesFor = (task) => {
    const places = task.shown.map((_, i) => i);
    return shuffled(places, generator(seedOf(content.study + state.participant + task.id)));
  };

  const warn = (text) => { at("warning").textContent = text; at("warning").hidden = false; };
  const keep = () => {
    try {
      localStorage.setItem(slot, JSON.stringify(state));
    } catch (fault) {
      warn("This browser cannot keep your progress: do not close the page before you have saved your answers.");
    }
  };
  const restore = () => {
    try {
      const found = JSON.parse(localStorage.getItem(slot));
      const whole = found && typeof found.answers === "object" && Array.isArray(found.order) && found.order.every((id) => byId.has(id));
      return whole ? found : null;
    } catch (fault) {
      return null;
    }
  };

  const element = (tag, parts, ...children) => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(parts)) node[name] = value;
    node.append(...children);
    return node;
  };
  const sample = (task, shown, i) => {
    const number = i + 1;
    return task.side === "image"
      ? element("img", { src: content.images[shown], alt: "Image " + number })
      : element("span", { textContent: shown }); // text of the data: never as mark-up
  };

  const draw = () => {
    const done = state.place >= state.order.length;
    at("start").hidden = true;
    at("work").hidden = done;
    at("end").hidden = !done;
    at("saving").hidden = false;
    if (done) {
      at("save").focus();
      return;
    }
    const task = byId.get(state.order[state.place]);
    const intruder = task.kind === "intruder";
    const what = task.side === "image" ? "image" : "text";
    at("progress").textContent = "Task " + (state.place + 1) + " of " + state.order.length;
    at("bar").value = state.place / state.order.length;
    at("question").textContent = intruder ? "Which " + what + " does not belong?" : "What do these " + what + "s have in common?";
    at("shown").className = what + "s";
    at("shown").replaceChildren(...placesFor(task).map((place, i) => {
      const shown = sample(task, task.shown[place], i);
      if (!intruder) return element("div", { className: "choice plain" }, shown);
      const radio = element("input", { type: "radio", name: "choice", value: String(place), required: true });
      const number = element("span", { textContent: String(i + 1) });
      return element("label", { className: "choice" }, radio, number, shown);
    }));
    at("naming").hidden = intruder;
    at("name").value = "";
    at("name").required = !intruder;
    at("name").disabled = intruder;
    at("nothing").checked = false;
    (intruder ? at("question") : at("name")).focus();
    since = Date.now();
  };

  const answered = () => {
    const task = byId.get(state.order[state.place]);
    if (task.kind === "name") {
      const name = at("nothing").checked ? "" : at("name").value.trim();
      return at("nothing").checked || name ? { name } : null;
    }
    const chosen = document.querySelector("input[name=choice]:checked");
    return chosen ? { choice: Number(chosen.value) } : null;
  };

  at("who").addEventListener("submit", (event) => {
    event.preventDefault();
    const participant = at("participant").value.trim();
    if (!participant) return;
    state = { participant, started: new Date().toISOString(), order: orderFor(participant), place: 0, answers: {} };
    keep();
    draw();
  });
  at("nothing").addEventListener("change", () => {
    at("name").disabled = at("nothing").checked;
    at("name").required = !at("nothing").checked;
  });
  at("task").addEventListener("submit", (event) => {
    event.preventDefault();
    const answer = answered();
    if (!answer) return;
    const seconds = Math.round((Date.now() - since) / 100) / 10;
    state.answers[state.order[state.place]] = { ...answer, seconds, place: state.place };
    state.place += 1;
    keep();
    draw();
  });
  document.addEventListener("keydown", (event) => {
    if (event.target.id === "name" || event.target.id === "participant" || event.ctrlKey || event.metaKey || event.altKey) return;
    const choices = document.querySelectorAll("input[name=choice]");
    if (event.key >= "1" && event.key <= String(choices.length) && event.key.length === 1) {
      const radio = choices[Number(event.key) - 1];
      radio.checked = true;
      radio.focus();
    } else if (event.key === "Enter" && event.target.type === "radio") {
      event.preventDefault();
      at("task").requestSubmit();
    }
  });
  at("save").addEventListener("click", () => {
    const answers = {
      format: content.format, study: content.study, participant: state.participant, started: state.started,
      saved: new Date().toISOString(), answers: state.answers,
    };
    const url = URL.createObjectURL(new Blob([JSON.stringify(answers, null, 1)], { type: "application/json" }));
    const name = "answers-" + state.participant.replace(/[^A-Za-z0-9_-]/g, "_") + ".json";
    element("a", { href: url, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(url), 60000);
    at("saved").textContent = "Saved as " + name + " (" + Object.keys(state.answers).length + " of " + state.order.length + " answers).";
    at("another").hidden = false;
  });
  at("again").addEventListener("click", () => {
    localStorage.removeItem(slot);
    location.reload();
  });

  state = restore();
  if (state) draw();
})();
