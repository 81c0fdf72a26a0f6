/** Requests to the server, and the events that it sends back. */

export const GONE = "The server is gone: the connection failed. Start it again, then reload this page.";

/** What the server answers to settings as JSON; an Error with its sentence if it refuses. */
export async function ask(path, settings, signal) {
  const options = settings && {method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(settings), signal};
  const answer = await fetch(path, options).catch(gone);
  if (!answer.ok) {
    const told = await answer.json().catch(() => ({}));  // a proxy answers with a page of its own
    throw new Error(told.error ?? `The server, or a proxy before it, answered ${answer.status} ${answer.statusText}.`);
  }
  return answer;
}

/** Why nothing comes: the visitor has stopped it, or the connection has failed. */
function gone(error) {
  throw error.name === "AbortError" ? error : new Error(GONE);
}

/** The data of each `step` of an event stream; `waiting` is called with the place in the queue. */
export async function* steps(answer, waiting) {
  let ended = false;
  for await (const [name, data] of events(answer.body)) {
    if (name === "waiting") waiting(data.place === 1 ? "Another request is being served; yours is next."
      : `Other requests are being served; yours is number ${data.place} in the queue.`);
    else if (name === "error") throw new Error(data.error);
    else if (name === "step") yield data;
    ended = name === "end";
  }
  if (!ended) throw new Error(GONE);
}

/** Server-sent events by fetch: unlike EventSource it tells what was wrong, and does not ask again by itself. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  const read = () => reader.read().catch(gone);
  for (let part = await read(); !part.done; part = await read()) {
    const messages = (text + part.value).split("\n\n");
    text = messages.pop();
    for (const message of messages) {
      const [, name, data] = message.match(/^event: (.*)\ndata: (.*)$/);
      yield [name, JSON.parse(data)];
    }
  }
}
