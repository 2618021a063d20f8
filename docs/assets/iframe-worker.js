// Search from a folder: browsers start no workers from file: pages, so the worker's script runs in a hidden frame instead.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(script) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      // In the frame, what the worker posts goes to the page, and scripts that it imports become tags.
      frame.srcdoc =
        "<script>receive = postMessage; postMessage = message => parent.postMessage(message, '*');" +
        "importScripts = (...urls) => urls.forEach(url => document.write('<script src=\"' + url + '\"></' + 'script>'))" +
        "</" + "script><script src=\"" + new URL(script, location.href) + "\"></" + "script>"
      this.frame = frame
      this.loaded = new Promise(done => frame.addEventListener("load", done))
      addEventListener("message", event => {
        if (event.source === frame.contentWindow) this.dispatchEvent(new MessageEvent("message", { data: event.data }))
      })
      const attach = () => document.body.append(frame)
      document.body ? attach() : addEventListener("DOMContentLoaded", attach)
    }
    postMessage(message) {
      this.loaded.then(() => this.frame.contentWindow.receive(message, "*"))
    }
    terminate() {
      this.frame.remove()
    }
  }
}
