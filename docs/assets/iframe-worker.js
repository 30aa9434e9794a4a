// Makes search work in pages that are opened from disk. Browsers start no worker there, so an
// iframe stands for it. The theme would fetch a script that does the same from the network.
if (location.protocol === "file:")
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      this.inside = frame.contentWindow;
      addEventListener("message", (event) => {
        if (event.source === this.inside)
          this.dispatchEvent(new MessageEvent("message", { data: event.data }));
      });
      this.inside.document.write(
        `<body><script>
          postMessage = (data) => parent.postMessage(data, "*");
          importScripts = (...urls) => Promise.all(urls.map((url) => new Promise((done) => {
            const script = document.createElement("script");
            script.src = url;
            script.onload = done;
            document.body.append(script);
          })));
        <\/script><script src="${url}"><\/script>`
      );
      this.ready = new Promise((done) => frame.addEventListener("load", done));
      this.inside.document.close();
    }
    postMessage(data) {
      this.ready.then(() =>
        this.inside.dispatchEvent(new MessageEvent("message", { data }))
      );
    }
    terminate() {}
  };
